"""PyTorch's `varlen_attn` in plain operations, for CPUs."""

import torch


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=True,
):
    """What PyTorch's kernels refuse is refused. 2.11 groups heads without being told."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert query.shape[2] == key.shape[2] and key.shape == value.shape
    assert all(x.stride(-1) == 1 for x in (query, key, value)) and window_size == (-1, 0)
    assert return_aux.lse
    bounds = []
    for lengths, most, x in ((cu_seq_q, max_q, query), (cu_seq_k, max_k, key)):
        assert lengths.dtype == torch.int32 and lengths.is_contiguous()
        assert lengths[-1] == len(x) and lengths.diff().max() == most
        bounds.append(lengths.diff().tolist())
    outputs, sums = [], []
    each = zip(query.split(bounds[0]), key.split(bounds[1]), value.split(bounds[1]), strict=True)
    for q, k, v in each:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        future = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        logits = torch.einsum("thd,shd->hts", q, k) * scale
        seen = logits.masked_fill(future, -torch.inf)
        outputs.append(torch.einsum("hts,shd->thd", seen.softmax(dim=-1), v))
        sums.append(seen.logsumexp(dim=-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)
