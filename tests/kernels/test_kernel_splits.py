import pytest
import torch

from locret.kernels.splits import (
    States,
    merge_attention,
    merge_attention_reference,
    merge_states_reference,
    share_out,
)
from tests.kernels.close import assert_near


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "tokens", "size"), [(1, 1, 16), (6, 33, 80), (9, 70, 64)])
def test_merged_is_what_the_twin_gives(dtype, heads, tokens, size, device):
    first = torch.randn(2, heads, tokens, size, device=device).to(dtype)
    second = torch.randn(2, tokens, heads, size, device=device).to(dtype).transpose(1, 2)
    logsumexps = 5 * torch.randn(2, 2, heads, tokens, device=device)
    sets = (first, logsumexps[0], second, logsumexps[1].mT.contiguous().mT)
    merged = merge_attention(*sets)
    assert merged.shape == (2, tokens, heads, size)
    assert merged.is_contiguous()
    assert merged.dtype == dtype
    expected = merge_attention_reference(*sets)
    assert torch.allclose(merged.float(), expected.float(), rtol=2e-2, atol=1e-2)


def test_merged_is_attention_over_both_sets(device):
    query, key, value = torch.randn(3, 1, 2, 12, 16, device=device)

    def attention(keys, values):
        logits = query @ keys.mT
        return logits.softmax(-1) @ values, logits.logsumexp(-1)

    merged = merge_attention(
        *attention(key[:, :, :5], value[:, :, :5]), *attention(key[:, :, 5:], value[:, :, 5:])
    )
    whole, _ = attention(key, value)
    assert torch.allclose(merged, whole.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "heads", "group", "new", "size", "lengths", "others", "tail_splits"),
    [
        (1, 3, 1, 1, 16, [700, 0, 5], None, 1),
        (2, 2, 4, 2, 80, [0, 900, 20, 1], [3, 0, 40, 30], 3),
        (1, 1, 3, 1, 40, [0], None, 2),
        (2, 1, 2, 1, 64, [30, 0], [0, 0], 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_tiles_and_tails_merge(
    batch, heads, group, new, size, lengths, others, tail_splits, dtype, device
):
    kinds = (lengths,) if others is None else (lengths, others)
    shares = [share_out(kind, 8, device, least=8) for kind in kinds]
    query = torch.empty(batch, heads * group, new, size, device=device)
    states = States.empty(query, heads, sum(share.count for share in shares), tail_splits)
    states.values.normal_()
    states.weights.normal_(std=20.0)
    states.weights[torch.rand(states.weights.shape, device=device) < 0.3] = -torch.inf
    out, expected = torch.full((2, *query.shape), torch.nan, device=device, dtype=dtype)
    states.merge(out, shares)
    merge_states_reference(states, expected, shares)
    assert not expected.isnan().any()
    assert_near(out, expected)


def test_many_states_of_one_sequence(device):
    shares = [share_out([2, 900, 1], 300, device, least=3)]
    query = torch.empty(1, 3, 1, 32, device=device)
    states = States.empty(query, 3, shares[0].count, 2)
    states.values.normal_()
    states.weights.copy_(torch.arange(len(states.weights), device=device)[:, None])
    out, expected = torch.empty(2, *query.shape, device=device)
    states.merge(out, shares)
    merge_states_reference(states, expected, shares)
    assert_near(out, expected)
