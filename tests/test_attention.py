"""Causal attention of new tokens over slots: both backends against one query at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.model import backends
from locret.model.backends import attend, attend_by_products
from locret.model.hooks import PLAIN, Weighting


def naive(query, key, value, scaling, weighting=PLAIN, empty=None):
    batch, query_heads, new, size = query.shape
    group, slots = query_heads // key.shape[1], key.shape[2]
    output = torch.empty(batch, new, query_heads, size)
    for b in range(batch):
        for h in range(query_heads):
            for t in range(new):
                seen = slots - new + t + 1
                first = max(seen - (weighting.window or seen), 0)
                if empty is not None:
                    first = min(max(first, int(empty[b, h // group])), seen - 1)
                keys, values = (x[b, h // group, first:seen].float() for x in (key, value))
                logits = keys @ query[b, h, t].float() * scaling
                if weighting.softcap is not None:
                    logits = weighting.softcap * torch.tanh(logits / weighting.softcap)
                if weighting.sinks is not None:
                    logits = torch.cat([logits, weighting.sinks[h : h + 1]])
                output[b, t, h] = logits.softmax(dim=0)[: len(values)] @ values
    return output


def random_inputs(batch, heads, group, new, slots, dtype=torch.float32):
    generator = torch.Generator().manual_seed(new * 100 + slots)
    shapes = [(batch, heads * group, new, 8), *[(batch, heads, slots, 8)] * 2]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@settings(max_examples=40)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    new=st.integers(1, 9),
    held=st.integers(0, 20),
    scaling=st.sampled_from([8**-0.5, 1.0, 0.02]),
)
def test_new_tokens_see_what_is_held_and_themselves(
    backend, batch, heads, group, new, held, scaling
):
    inputs = random_inputs(batch, heads, group, new, held + new)
    output = attend(*inputs, scaling, backend)
    assert output.shape == (batch, new, heads * group, 8)
    assert output.is_contiguous()
    assert (output - naive(*inputs, scaling)).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(("new", "slots"), [(1, 1), (1, 63), (63, 63), (7, 63)])
def test_half_precision(backend, new, slots):
    inputs = random_inputs(1, 2, 2, new, slots, torch.bfloat16)
    output = attend(*inputs, 0.35, backend)
    assert output.dtype == torch.bfloat16
    assert (output.float() - naive(*inputs, 0.35)).abs().max() < 3e-2


@pytest.mark.parametrize(("new", "slots"), [(1, 1), (64, 64), (63, 90), (65, 65), (130, 131)])
@pytest.mark.parametrize("safe", [0.0, backends._SAFE])
def test_products_of_blocks(new, slots, safe, monkeypatch):
    monkeypatch.setattr(backends, "_SAFE", safe)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.06)):
        query, key, value = random_inputs(2, 3, 2, new, slots, dtype)
        key[..., :4] += 100  # a bias: logits that were rounded with it would lose the rest
        output = attend_by_products(query, key, value, 0.3).transpose(1, 2)
        plain = naive(query, key, value, 0.3)
        torch.testing.assert_close(output.float(), plain, atol=tolerance, rtol=0)


def test_products_of_large_logits(monkeypatch):
    query, key, value = random_inputs(1, 2, 2, 40, 50, torch.bfloat16)
    inputs = query * 30, key * 30, value, 0.3  # exponentials of their logits are infinite
    output = attend_by_products(*inputs)
    monkeypatch.setattr(backends, "_SAFE", 0.0)
    assert output.isfinite().all() and torch.equal(output, attend_by_products(*inputs))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_token_never_sees_the_next(backend):
    query, key, value = random_inputs(1, 2, 2, 4, 10)
    before = attend(query, key, value, 0.35, backend)
    key[:, :, -1], value[:, :, -1] = 9.0, torch.nan
    after = attend(query[:, :, :3], key[:, :, :9], value[:, :, :9], 0.35, backend)
    assert torch.allclose(after, before[:, :3], atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@settings(max_examples=60)
@given(
    group=st.integers(1, 3),
    new=st.integers(1, 9),
    held=st.integers(0, 12),
    window=st.sampled_from([None, 1, 2, 5, 30]),
    softcap=st.sampled_from([None, 0.7]),
    sinks=st.booleans(),
    empty=st.sampled_from([None, 0, 3, 30]),
)
def test_windows_softcaps_sinks_and_empty_slots(
    backend, group, new, held, window, softcap, sinks, empty
):
    inputs = random_inputs(2, 2, group, new, held + new)
    weighting = Weighting(window, softcap, torch.randn(2 * group) if sinks else None)
    if empty is not None:
        empty = torch.tensor([[0, 0], [empty, empty]]).clamp(max=held + new)
    output = attend(*inputs, 0.5, backend, empty, weighting)
    assert (output - naive(*inputs, 0.5, weighting, empty)).abs().max() < 1e-5


def test_many_queries_in_blocks(monkeypatch):
    from locret.model import backends

    inputs = random_inputs(2, 2, 2, 9, 20)
    whole = attend(*inputs, 0.5, "eager")
    monkeypatch.setattr(backends, "_BLOCK_ELEMENTS", 300)
    assert (attend(*inputs, 0.5, "eager") - whole).abs().max() < 1e-6
