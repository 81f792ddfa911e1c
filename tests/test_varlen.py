"""Texts of one row in one call: wired as one after the other, whatever computes the call."""

import pytest
import torch

from locret.model import varlen
from locret.model.backends import attend
from locret.model.hooks import PLAIN


def plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, **_):
    """PyTorch's `varlen_attn`, a sequence after the other."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    bounds = [x.tolist() for x in (cu_seq_q, cu_seq_k)]
    lengths = [[b - a for a, b in zip(x, x[1:], strict=False)] for x in bounds]
    assert [max(x) for x in lengths] == [max_q, max_k]
    assert [x[-1] for x in bounds] == [len(query), len(key)]
    rows = (x.transpose(0, 1)[None] for x in (query, key, value))
    split = [x.split(n, 2) for x, n in zip(rows, [lengths[0], *[lengths[1]] * 2], strict=True)]
    outputs = [attend(*each, scale, "eager")[0] for each in zip(*split, strict=True)]
    return torch.cat(outputs)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("elements", [2**28, 500])
def test_one_call_is_as_one_after_the_other(heads, elements, monkeypatch):
    generator = torch.Generator().manual_seed(heads)

    def drawn(heads, tokens):
        return torch.randn(1, heads, tokens, 8, generator=generator)

    tokens = [1, 5, 7, 3]
    query, trunk = drawn(4, 16), [drawn(heads, 11) for _ in range(2)]
    own = [drawn(heads, 16).split(tokens, 2) for _ in range(2)]
    texts = [
        varlen.Text(n, *((x[i],) if i == 1 else (t, x[i]) for t, x in zip(trunk, own, strict=True)))
        for i, n in enumerate(tokens)
    ]
    assert not varlen.takes_varlen(query, "sdpa", PLAIN)
    expected = varlen.attend_texts(query, texts, 0.3, "eager")
    monkeypatch.setattr(varlen, "_ELEMENTS", elements)
    monkeypatch.setattr(varlen, "takes_varlen", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    torch.testing.assert_close(varlen.attend_texts(query, texts, 0.3, "sdpa"), expected)
