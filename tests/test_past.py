"""Attention to what every new token sees, of sequences of any lengths: as the plain form has it."""

import pytest
import torch

import locret
from locret.cache.context import sequences_of
from locret.model import attend, varlen
from locret.model.attend import Past, are_few, attend_past
from tests.tiny_models import prompt, tiny_heads, tiny_model
from tests.varlen_twin import varlen_attn

RAGGED = ((4, 0, 9), (3, 70, 1))
EQUAL = ((5, 5, 5), (5, 5, 5))
HEADS, SIZE = 3, 8


def normal(generator, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture
def multiplies(monkeypatch):
    """Products of bfloat16 are fast, of any size, whatever the CPU."""
    monkeypatch.setattr(attend, "multiplies_bfloat16", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(attend, "_LONG", 0)


@pytest.mark.parametrize("counts", [RAGGED, EQUAL, None])
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize(("tokens", "group"), [(1, 1), (1, 4), (5, 2), (16, 2), (17, 2), (130, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_and_many_queries_see_the_same(multiplies, counts, tail, tokens, group, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, pasts = 2, []
    if counts is not None:
        sequences = sequences_of(counts, torch.device("cpu"))
        flat = [normal(generator, sequences.total, SIZE, dtype=dtype) for _ in range(2)]
        pasts.append(Past(*flat, sequences))
    shape = rows, HEADS, tail, SIZE
    pasts.append(Past(*(normal(generator, *shape, dtype=dtype) for _ in range(2))))
    query = normal(generator, rows, HEADS * group, tokens, SIZE, dtype=dtype)
    new = tuple(normal(generator, rows, HEADS, tokens, SIZE, dtype=dtype) for _ in range(2))
    assert are_few(query, pasts, new) == (tokens * group <= 32)
    tolerance = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 0.06}
    fast, plain = (attend_past(query, pasts, new, 0.4, how) for how in ("sdpa", "eager"))
    torch.testing.assert_close(fast, plain, rtol=0, **tolerance)


@pytest.mark.parametrize("counts", [RAGGED, EQUAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_sees_its_own_unit_in_the_tail(multiplies, counts, dtype):
    generator = torch.Generator().manual_seed(1)
    sequences = sequences_of(counts, torch.device("cpu"))
    flat = [normal(generator, sequences.total, SIZE, dtype=dtype) for _ in range(2)]
    tail = [normal(generator, 2, HEADS, 4, SIZE, dtype=dtype) for _ in range(2)]
    query = normal(generator, 2, HEADS * 2, 1, SIZE, dtype=dtype)
    pasts = [Past(*flat, sequences), Past(*tail)]
    together = attend_past(query, pasts, None, 0.4, "sdpa")
    before = [pasts[0], Past(*(x[:, :, :3] for x in tail))]
    apart = attend_past(query, before, tuple(x[:, :, 3:] for x in tail), 0.4, "eager")
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(together, apart, rtol=0, atol=tolerance)


@pytest.mark.parametrize("counts", [((4, 2, 9), (3, 70, 1)), EQUAL])
def test_few_queries_of_few_bits_tell_keys_with_a_bias_apart(multiplies, counts):
    generator = torch.Generator().manual_seed(4)
    sequences = sequences_of(counts, torch.device("cpu"))
    keys, values = (normal(generator, sequences.total, SIZE) for _ in range(2))
    query = normal(generator, 2, HEADS, 1, SIZE)
    keys[:, :2] += 100  # logits that were rounded with it would lose the rest
    exact = [x.bfloat16().float() for x in (query, keys, values)]
    plain = attend_past(exact[0], [Past(*exact[1:], sequences)], None, 0.5, "eager")
    few = [x.bfloat16() for x in exact]
    past = Past(*few[1:], sequences)
    assert are_few(few[0], [past], None)
    seen = attend_past(few[0], [past], None, 0.5, "sdpa")
    torch.testing.assert_close(seen.float(), plain, rtol=0, atol=0.06)


def test_few_queries_of_few_bits_take_products_of_long_sequences(multiplies, monkeypatch):
    monkeypatch.setattr(attend, "_LONG", 30)
    query, keys = torch.zeros(2, HEADS, 1, SIZE).bfloat16(), torch.zeros(30, SIZE).bfloat16()
    for counts, long in ((EQUAL, True), (((5, 5, 5), (6, 6, 3)), False)):
        past = Past(keys, keys, sequences_of(counts, torch.device("cpu")))
        assert are_few(query, [past], None) == long


@pytest.fixture
def at_once(monkeypatch):
    """Ragged pasts take one call, wherever they are; how often they did, at the end."""
    calls = []
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda *a, **k: calls.append(1) or varlen_attn(*a, **k)
    )
    monkeypatch.setattr(varlen, "_GROUPED", {})
    monkeypatch.setattr(attend, "fits", lambda query, backend: backend == "sdpa")
    monkeypatch.setattr(attend, "SPLIT_FROM", 2)
    return calls


@pytest.mark.parametrize("counts", [RAGGED, ((0, 0, 1), (0, 33, 0)), ((7,), (5,))])
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize(("tokens", "group"), [(2, 1), (5, 4), (130, 2)])
def test_sequences_of_different_lengths_take_one_call(at_once, counts, tail, tokens, group):
    generator = torch.Generator().manual_seed(2)
    (rows, heads), sequences = (2, len(counts[0])), sequences_of(counts, torch.device("cpu"))
    pasts = [Past(*(normal(generator, sequences.total, SIZE) for _ in range(2)), sequences)]
    pasts.append(Past(*(normal(generator, rows, heads, tail, SIZE) for _ in range(2))))
    query = normal(generator, rows, heads * group, tokens, SIZE)
    # values as projections leave them: token by token
    new = normal(generator, rows, heads, tokens, SIZE), normal(generator, rows, tokens, heads, SIZE)
    new = new[0], new[1].transpose(1, 2)
    fast, plain = (attend_past(query, pasts, new, 0.4, how) for how in ("sdpa", "eager"))
    assert len(at_once) == 1 and fast.is_contiguous()
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-5)


def test_rectangles_and_single_tokens_take_no_such_call(at_once):
    generator = torch.Generator().manual_seed(3)
    for counts, tokens in ((EQUAL, 5), (RAGGED, 1)):
        sequences = sequences_of(counts, torch.device("cpu"))
        past = Past(*(normal(generator, sequences.total, SIZE) for _ in range(2)), sequences)
        query, *new = (normal(generator, 2, HEADS, tokens, SIZE) for _ in range(3))
        attend_past(query, [past], tuple(new), 0.4, "sdpa")
    assert not at_once


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_an_engine_reads_unequal_heads_in_one_call_a_layer_and_chunk(
    at_once, kv_heads, monkeypatch
):
    model = tiny_model("qwen2.5", num_attention_heads=4, num_key_value_heads=kv_heads)
    quotas = torch.arange(2.0 * kv_heads).view(2, kv_heads) + 1
    settings = {"budget": 24, "chunk_size": 17, "stabilizers": 3, "quotas": quotas}
    engine = locret.Engine(model, heads=tiny_heads(model), backend="sdpa", **settings)
    caches = [engine.prefill(prompt(100))]
    assert len(at_once) == 5  # chunks behind the first; nobody asks for the last layer's output
    monkeypatch.setattr(attend, "_MOST_WORK", 0)
    caches.append(engine.prefill(prompt(100)))
    assert len(at_once) == 5
    for mine, plain in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(mine.store.context.positions[0], plain.store.context.positions[0])
        torch.testing.assert_close(mine.keys, plain.keys, rtol=0, atol=1e-5)


def test_a_sequence_looks_the_same_whatever_others_stand_beside_it():
    """Fused attention plans by shapes and strides: what is alike is planned once."""
    looks = set()
    for lengths in ((5, 7), (30, 7)):
        sequences = sequences_of((lengths,), torch.device("cpu"))
        past = Past(torch.randn(sum(lengths), 8), torch.randn(sum(lengths), 8), sequences)
        looks |= {(x.shape, x.stride()) for x in past.of(0, 1)}
    assert len(looks) == 1


@pytest.mark.parametrize("counts", [RAGGED, None])
def test_few_queries_have_gradients(counts):
    """Also to pasts that were made without: a context was read so."""
    generator = torch.Generator().manual_seed(0)
    query = normal(generator, 2, HEADS, 1, SIZE).requires_grad_()
    new = [normal(generator, 2, HEADS, 1, SIZE).requires_grad_() for _ in range(2)]
    pasts = [Past(*(normal(generator, 2, HEADS, 4, SIZE) for _ in range(2)))]
    if counts is not None:
        sequences = sequences_of(counts, torch.device("cpu"))
        pasts.append(Past(*(normal(generator, sequences.total, SIZE) for _ in range(2)), sequences))
    output = attend_past(query, pasts, tuple(new), 0.3, "sdpa")
    for gradient in torch.autograd.grad(output.square().sum(), (query, *new)):
        assert gradient.isfinite().all() and gradient.any()
