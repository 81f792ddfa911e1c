"""Merge attention over two sets of keys into attention over both, by their log-sum-exps.

B batch, N query heads, T tokens, D head size.
"""

import torch
from torch import Tensor

from locret.kernels.dispatch import on_device, padded, takes_triton, tl, triton

_BLOCK = 32  # tokens of one head that a program merges


def merge_parts(
    first: Tensor, first_logsumexp: Tensor, second: Tensor, second_logsumexp: Tensor
) -> Tensor:
    """Attention over both parts' keys.

    Args:
        first, second: outputs over either part, [B, N, T, D], of any strides.
        first_logsumexp, second_logsumexp: [B, N, T] float32, natural logarithms.

    Returns:
        [B, T, N, D], contiguous, in the outputs' dtype.
    """
    parts = (first, first_logsumexp, second, second_logsumexp)
    return _launch(*parts) if takes_triton(*parts) else merge_parts_reference(*parts)


def merge_parts_reference(
    first: Tensor, first_logsumexp: Tensor, second: Tensor, second_logsumexp: Tensor
) -> Tensor:
    """The twin of `merge_parts`, in plain PyTorch."""
    share = torch.sigmoid(first_logsumexp - second_logsumexp)[..., None]
    merged = first.float() * share + second.float() * (1 - share)
    return merged.to(first.dtype).transpose(1, 2).contiguous()


def _launch(
    first: Tensor, first_logsumexp: Tensor, second: Tensor, second_logsumexp: Tensor
) -> Tensor:
    batch, heads, tokens, size = first.shape
    first, second = (x if x.stride(-1) == 1 else x.contiguous() for x in (first, second))
    merged = torch.empty(batch, tokens, heads, size, dtype=first.dtype, device=first.device)
    with on_device(first):
        _merge[(triton.cdiv(tokens, _BLOCK), heads, batch)](
            *(first, first_logsumexp, second, second_logsumexp, merged, tokens, heads),
            *first.stride()[:3],
            *second.stride()[:3],
            *first_logsumexp.stride(),
            *second_logsumexp.stride(),
            SIZE=size,
            PADDED=padded(size),
            BLOCK=_BLOCK,
        )
    return merged


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    first,
    first_lse,
    second,
    second_lse,
    merged,
    tokens,
    heads,
    f_b,
    f_n,
    f_t,
    s_b,
    s_n,
    s_t,
    lf_b,
    lf_n,
    lf_t,
    ls_b,
    ls_n,
    ls_t,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    inside = t < tokens
    both = inside[:, None] & (d < SIZE)[None, :]
    t64 = t.to(tl.int64)
    a = tl.load(first_lse + row * lf_b + head * lf_n + t64 * lf_t, mask=inside, other=0.0)
    b = tl.load(second_lse + row * ls_b + head * ls_n + t64 * ls_t, mask=inside, other=0.0)
    share = tl.sigmoid(a - b)[:, None]
    at_first = first + row * f_b + head * f_n + t64[:, None] * f_t + d[None, :]
    at_second = second + row * s_b + head * s_n + t64[:, None] * s_t + d[None, :]
    x = tl.load(at_first, mask=both, other=0.0).to(tl.float32)
    y = tl.load(at_second, mask=both, other=0.0).to(tl.float32)
    result = x * share + y * (1 - share)
    to = merged + ((row * tokens + t64[:, None]) * heads + head) * SIZE + d[None, :]
    tl.store(to, result.to(merged.dtype.element_ty), mask=both)
