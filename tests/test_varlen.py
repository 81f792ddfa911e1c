"""Texts of one row in one call: wired as one after the other, whatever computes the call."""

import pytest
import torch

from locret.model import varlen
from locret.model.hooks import PLAIN
from tests.varlen_twin import varlen_attn


def plain_sums(query, key, scale):
    """Log-sum-exps [H*G, T] of queries [1, H*G, T, D], the last of keys [1, H, S, D]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = scale * query[0] @ key[0].mT
    hidden = torch.ones_like(logits, dtype=torch.bool).triu(1 + key.shape[2] - query.shape[2])
    return logits.masked_fill(hidden, -torch.inf).logsumexp(-1)


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
    expected, unknown = varlen.attend_texts(query, texts, 0.3, "eager")
    assert unknown is None
    monkeypatch.setattr(varlen, "_ELEMENTS", elements)
    monkeypatch.setattr(varlen, "takes_varlen", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    output, sums = varlen.attend_texts(query, texts, 0.3, "sdpa")
    torch.testing.assert_close(output, expected)
    queries = query.split(tokens, 2)
    own = [plain_sums(q, torch.cat(t.keys, 2), 0.3) for q, t in zip(queries, texts, strict=True)]
    torch.testing.assert_close(sums, torch.cat(own, dim=1)[None])
