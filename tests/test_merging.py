"""Evicted values merged into units that stay, against a naive twin (tests/policy_reference.py)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import locret
from locret.cache.context import sequences_of
from locret.cache.merging import (
    Mergeable,
    Merging,
    describe_merging,
    merge_evicted,
    merging_of,
)
from locret.cache.store import NewTokens, Store
from locret.model.attend import Past, attend_past, with_bias_in_channels
from locret.model.hooks import PLAIN
from locret.policies.compose import AdaptiveHeads, SharedLayers
from tests import policy_reference
from tests.policy_reference import Unit, merge
from tests.test_batches import assert_each_row_as_alone
from tests.test_compose import policy_of, twin
from tests.tiny_models import distinct_prompt, prompt, tiny_heads, tiny_model

VOCAB = 512
SMALL = {"budget": 17, "chunk_size": 9, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
SCORES = {"output_scores": True, "return_dict_in_generate": True}
ALL = Merging(threshold=None, sinks=0)
RULES = {
    "similar": Merging(),
    "adjacent": Merging("adjacent"),
    "everything": ALL,
    "text": Merging("adjacent", threshold=None, sinks=2),
    "alike": Merging(threshold=0.3, sinks=1),
    "folded": Merging(fold=True),
    "all folded": Merging("adjacent", threshold=None, sinks=0, fold=True),
}


@pytest.fixture(scope="module", params=[2, 8], ids=["GQA", "MHA"])
def model(request):
    return tiny_model("llama", num_key_value_heads=request.param, vocab_size=VOCAB)


# --- the function ---


@st.composite
def evictions(draw):
    """Units, what stays, and how many slots and entries stand for nothing."""
    batch, heads, size = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 24))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    empty = torch.randint(0, size, (batch, heads)) if draw(st.booleans()) else None
    hollow = torch.zeros(batch, heads, dtype=torch.long) if empty is None else empty
    uneven = draw(st.booleans())
    most = draw(st.integers(1, size))
    filled = size - hollow
    counts = filled.clamp(max=most)
    if uneven:
        counts = (torch.rand(batch, heads) * (counts + 1)).long().clamp(min=1)
    kept = int(counts.max())
    index = torch.zeros(batch, heads, kept, dtype=torch.long)
    for b in range(batch):
        for h in range(heads):
            chosen = torch.randperm(int(filled[b, h]))[: counts[b, h]].sort().values + hollow[b, h]
            index[b, h, kept - len(chosen) :] = chosen
    fillers = kept - counts
    positions = torch.arange(size).expand(batch, heads, size) - hollow[..., None]
    steps = torch.randint(1, 4, (batch, heads, size)).cumsum(dim=-1)
    units = Mergeable(
        torch.randn(batch, heads, size, 4),
        torch.randn(batch, heads, size, 3),
        torch.where(positions < 0, 0, steps - steps.min()),
        torch.randint(1, 9, (batch, heads, size)).float(),
        torch.randn(batch, heads, size),
    )
    return units, index, empty, fillers if uneven or empty is not None else None


merging_rules = st.builds(
    Merging,
    into=st.sampled_from(["similar", "adjacent"]),
    threshold=st.sampled_from([None, "mean", -0.5, 0.0, 0.7]),
    sinks=st.integers(0, 6),
    fold=st.booleans(),
)


@given(evictions(), merging_rules, st.integers(0, 5))
def test_against_the_twin(eviction, merging, query):
    units, index, empty, fillers = eviction
    found = merge_evicted(units, index, merging, empty=empty, fillers=fillers, query=query)
    for b in range(index.shape[0]):
        for h in range(index.shape[1]):
            skip = 0 if empty is None else int(empty[b, h])
            column = [tensor[b, h] for tensor in units]
            twins = [
                Unit(int(position), key, value, weight=float(weight), score=float(score))
                for key, value, position, weight, score in zip(*column, strict=True)
            ]
            first = 0 if fillers is None else int(fillers[b, h])
            kept = [twins[i] for i in index[b, h, first:].tolist()]
            merge(twins[skip:], kept, merging, query)
            weights = [unit.weight for unit in kept]
            assert found.weights[b, h, first:].tolist() == pytest.approx(weights, rel=1e-5)
            assert not found.weights[b, h, :first].any()
            if kept:
                expected = torch.stack([unit.value for unit in kept])
                torch.testing.assert_close(found.values[b, h, first:], expected)


@given(evictions(), st.sampled_from(["similar", "adjacent"]))
def test_nothing_is_lost_where_everything_is_merged(eviction, into):
    units, index, empty, fillers = eviction
    merging = Merging(into, threshold=None, sinks=0)
    found = merge_evicted(units, index, merging, empty=empty, fillers=fillers)
    slot = torch.arange(units.weights.shape[2])
    filled = units.weights * (slot >= (0 if empty is None else empty[..., None]))
    assert torch.equal(found.weights.sum(dim=-1), filled.sum(dim=-1))
    before = (units.values * filled[..., None]).sum(dim=2)
    after = (found.values * found.weights[..., None]).sum(dim=2)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_what_receives_nothing_stays_bit_for_bit():
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 30, 8)
    values = torch.randn(1, 2, 30, 8, dtype=torch.bfloat16)
    positions = torch.arange(30).expand(1, 2, 30)
    units = Mergeable(keys, values, positions, torch.ones(1, 2, 30) * 3)
    index = torch.arange(0, 30, 3).expand(1, 2, 10)
    found = merge_evicted(units, index, Merging(threshold=1.0))
    assert torch.equal(found.values, values[:, :, ::3])
    assert torch.equal(found.weights, torch.full((1, 2, 10), 3.0))
    found = merge_evicted(units, index, Merging(threshold=None))
    assert found.values.dtype == torch.bfloat16
    assert torch.equal(found.values[:, :, :2], values[:, :, :6:3])  # sinks
    assert int(found.weights.sum()) == 180


# --- in the engine ---


def assert_as_the_twin(cache, layers):
    for layer, expected in zip(cache.layers, layers, strict=True):
        for head, units in enumerate(expected.units):
            positions = layer.source_positions[0][head].tolist()
            assert positions == [unit.position for unit in units]
            weights = layer.store.split("weights")[0][head].tolist()
            assert weights == pytest.approx([unit.weight for unit in units], rel=1e-4)
            values = torch.stack([unit.value for unit in units])
            found = layer.store.split("values")[0][head]
            torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-4)


def weights(layer):
    """[B, H, S], zeros in front where heads hold fewer units than others."""
    return layer.store.rectangle("weights")


@pytest.mark.parametrize("chunk_size", [9, None])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["knorm", "sirllm", "snapkv"])
def test_values_are_the_twins(model, name, rule, chunk_size):
    ids, merging = distinct_prompt(47, VOCAB), RULES[rule]
    engine = locret.Engine(
        model, policy_of(name), merging=merging, budget=17, chunk_size=chunk_size, stabilizers=3
    )
    tokens = ids[0].tolist()
    layers, _ = policy_reference.run(model, twin(name), tokens, 17, chunk_size, 3, merging=merging)
    cache = engine.prefill(ids)
    assert_as_the_twin(cache, layers)
    assert cache.report()["units"] == [17, 17]
    assert cache.report()["merging"] == describe_merging(merging)


@pytest.mark.parametrize("compose", ["AdaptiveHeads", "SharedLayers"])
@pytest.mark.parametrize("rule", ["similar", "everything", "text", "all folded"])
def test_heads_that_keep_different_numbers(model, compose, rule):
    ids, merging = distinct_prompt(47, VOCAB), RULES[rule]
    ours = {"AdaptiveHeads": AdaptiveHeads, "SharedLayers": SharedLayers}[compose]
    policy, naive = ours("keydiff"), getattr(policy_reference, compose)(twin("keydiff"))
    engine = locret.Engine(model, policy, merging=merging, budget=17, chunk_size=9, stabilizers=3)
    tokens = ids[0].tolist()
    layers, _ = policy_reference.run(model, naive, tokens, 17, 9, 3, merging=merging)
    assert_as_the_twin(engine.prefill(ids), layers)


@pytest.mark.parametrize("name", ["knorm", "sirllm"])
def test_a_question_that_is_given_up_again_is_not_merged(model, name):
    ids, merging = distinct_prompt(47, VOCAB), RULES["everything"]
    engine = locret.Engine(
        model, name, merging=merging, query_aware=True, budget=17, chunk_size=9, stabilizers=3
    )
    layers, _ = policy_reference.run(
        model, twin(name), ids[0].tolist(), 17, 9, 3, together=6, drop=6, merging=merging
    )
    cache = engine.prefill(ids[:, :41], query_ids=ids[:, 41:])
    assert_as_the_twin(cache, layers)
    for layer in cache.layers:
        assert weights(layer).sum(dim=-1).eq(41).all()


def test_a_question_in_front_receives_nothing(model):
    heads = tiny_heads(model, query_tokens=6)
    engine = locret.Engine(model, heads=heads, merging=ALL, **SMALL)
    cache = engine.prefill(prompt(60), query_ids=prompt(6, seed=1))
    for layer in cache.layers:
        assert weights(layer)[:, :, :6].eq(1).all()
        assert weights(layer).sum(dim=-1).eq(66).all()


@pytest.mark.parametrize("name", ["keydiff", "sirllm", "h2o"])
def test_answers_that_are_evicted_stay_bounded_and_lose_nothing(model, name):
    engine = locret.Engine(model, name, merging=ALL, decode_interval=4, **SMALL)
    cache = engine.prefill(prompt(60))
    engine.generate(prompt(5, seed=1), cache=cache, max_new_tokens=40, do_sample=False)
    for layer in cache.layers:
        assert layer.longest <= 17 + 3
        assert weights(layer).sum(dim=-1).eq(cache.seen).all()


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("rule", ["similar", "adjacent", "all folded"])
def test_rows_as_alone(rule, positions):
    model = tiny_model("llama", vocab_size=8192)
    for settings in ({}, {"decode_interval": 3}):
        engine = locret.Engine(
            model,
            AdaptiveHeads("keydiff"),
            merging=RULES[rule],
            positions=positions,
            **SMALL,
            **settings,
        )
        assert_each_row_as_alone(engine, (60, 33, 4), vocab=8192, max_new_tokens=12)


@pytest.mark.parametrize("local_tokens", [40, 8])
def test_first_tokens_of_rows_without_a_context_receive_nothing(local_tokens):
    model = tiny_model("llama", vocab_size=8192)
    few = {"budget": 9, "chunk_size": 8, "stabilizers": 0, "decode_interval": 1}
    engine = locret.Engine(model, "keydiff", merging="similar", local_tokens=local_tokens, **few)
    assert_each_row_as_alone(engine, (30, 10), vocab=8192, max_new_tokens=12)


def test_off_costs_nothing_and_changes_nothing(model):
    ids = prompt(60)
    plain = locret.Engine(model, "keydiff", **SMALL)
    nothing_alike = locret.Engine(model, "keydiff", merging=Merging(threshold=1.0), **SMALL)
    without, merged = plain.prefill(ids), nothing_alike.prefill(ids)
    for ours, other in zip(without.layers, merged.layers, strict=True):
        assert [len(ours.store.tensors), len(other.store.tensors)] == [3, 4]
        for mine, others in zip(ours.store.tensors, other.store.tensors, strict=False):
            assert torch.equal(mine, others)
    assert torch.equal(plain.generate(ids, **GREEDY), nothing_alike.generate(ids, **GREEDY))
    keeps_all = locret.Engine(model, "full", merging="similar", **SMALL).prefill(ids)
    assert [len(layer.store.tensors) for layer in keeps_all.layers] == [3, 3]


def test_merging_changes_answers(model):
    cache = locret.Engine(model, "keydiff", merging=ALL, **SMALL).prefill(prompt(60))
    plain = locret.Engine(model, "keydiff", **SMALL).prefill(prompt(60))
    assert not torch.equal(cache.layers[0].values, plain.layers[0].values)
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)


def test_layers_with_a_window_merge_nothing():
    model = tiny_model("gemma3_text")
    cache = locret.Engine(model, "keydiff", merging=ALL, **SMALL).prefill(prompt(60))
    slides, retained = cache.layers
    assert len(slides.store.tensors) == 3
    assert weights(retained).sum(dim=-1).eq(60).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_contexts_are_saved_restored_and_repeated(tmp_path, dtype):
    model = tiny_model("llama").to(dtype)
    engine = locret.Engine(model, "keydiff", merging="similar", decode_interval=4, **SMALL)
    cache, question = engine.prefill(prompt(60)), prompt(4, seed=1)
    assert cache.layers[0].values.dtype == dtype
    cache.save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    before = cache.snapshot()
    first = engine.generate(question, cache=cache, **GREEDY)
    cache.restore(before)
    assert torch.equal(engine.generate(question, cache=cache, **GREEDY), first)
    assert torch.equal(engine.generate(question, cache=loaded, **GREEDY), first)
    assert loaded.merging == Merging()
    beams = engine.generate(prompt(60), num_beams=2, **GREEDY)
    assert beams.shape == (1, 68)


def test_units_written_in_place_weigh_one():
    store = Store(weighs=True)
    keys = torch.randn(1, 2, 5, 4)
    everything = torch.arange(5).repeat(2), sequences_of(((5, 5),), keys.device)
    store.retain(*everything, NewTokens.of(keys, keys, torch.arange(5)))
    store.replace_values(store.context.values, torch.full((10,), 3.0))
    store.make_room(4, starts=torch.tensor([5]))
    store.tail.count += 3
    assert store.split("weights")[0][1].tolist() == [3.0] * 5 + [1.0] * 3


def test_a_budget_in_bytes_counts_weights(model):
    settings = SMALL | {"budget": "40kB"}
    with_weights = locret.Engine(model, "keydiff", merging="similar", **settings)
    cache = with_weights.prefill(prompt(200))
    assert cache.nbytes <= 40_000
    assert cache.nbytes == with_weights.sizing.cache_bytes(
        [layer.longest for layer in cache.layers], 200
    )


# --- what is asked for ---


def test_names_and_options():
    assert merging_of(None) is None
    assert merging_of("adjacent") == Merging("adjacent")
    assert merging_of({"threshold": 0.5}) == Merging(threshold=0.5)
    assert merging_of(describe_merging(ALL)) == ALL


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ("values", "merging into 'values'; expected one of"),
        ({"into": "similar", "above": 1}, "some of into, threshold, sinks, fold"),
        ({"fold": 1}, "merging fold is 1"),
        ({"threshold": 1.5}, "threshold is 1.5; expected a cosine"),
        ({"threshold": "median"}, "threshold is 'median'"),
        ({"sinks": -1}, "sinks is -1"),
        (True, "merging is True"),
    ],
)
def test_what_is_no_merging_is_refused(model, asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        locret.Engine(model, "keydiff", merging=asked)


def test_quantization_beside_merging_is_refused(model):
    with pytest.raises(ValueError, match="quantization 'kivi' does not encode again"):
        locret.Engine(model, "keydiff", merging="similar", quantization="kivi")


# --- units that count for what was folded into them ---


FOLDED = ["llama", "exaone4", "gemma3_text", "gpt_oss", "granite", "phi3", "smollm3", "stablelm"]


@pytest.mark.parametrize("family", FOLDED)
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_bias_in_channels_is_a_bias_on_logits(family, positions, attn, monkeypatch):
    """Against plain attention over [context | tail] with the weights' logarithm added."""
    model = tiny_model(family, attn_implementation=attn)
    fold = Merging(threshold=None, fold=True)
    engine = locret.Engine(model, "keydiff", merging=fold, positions=positions, **SMALL)
    found = engine.generate(prompt(60), **GREEDY, **SCORES)

    def plain(query, pasts, new, scaling, backend, weighting=PLAIN):
        outputs = []
        group = query.shape[1] // (new[0] if new else pasts[-1].keys).shape[1]
        for head in range(query.shape[1]):
            each = [past.of(0, head // group) for past in pasts]
            each += [] if new is None else [tuple(x[:, head // group, None] for x in new)]
            keys, values = (torch.cat(x, dim=2)[0, 0] for x in zip(*each, strict=True))
            bias = torch.zeros(len(keys))
            if pasts and pasts[0].bias is not None:
                own = pasts[0].bias.split(pasts[0].sequences.flat)[head // group]
                bias[: len(own)] = own
            logits = query[0, head] @ keys.T * scaling + bias
            slot = torch.arange(len(keys))
            logits = logits.masked_fill(slot > slot[-query.shape[2] :, None], -torch.inf)
            if weighting.sinks is not None:
                sink = weighting.sinks[head].expand(len(logits), 1)
                logits = torch.cat([logits, sink], dim=1)
            outputs.append(logits.softmax(dim=-1)[:, : len(keys)] @ values)
        return torch.stack(outputs, dim=1)[None]

    monkeypatch.setattr("locret.engine.attention.attend_past", plain)
    expected = engine.generate(prompt(60), **GREEDY, **SCORES)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    without = locret.Engine(model, "keydiff", positions=positions, **SMALL)
    assert (without.generate(prompt(60), **GREEDY, **SCORES).scores[0] - found.scores[0]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [6, 8, 14])
def test_channels_carry_a_bias_exactly(dtype, size):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, size, dtype=dtype) for n in (3, 9, 9))
    bias = torch.rand(1, 2, 9) * 8
    scaling = size**-0.5
    wide, (past,), none = with_bias_in_channels(query, [Past(key, value, bias=bias)], None, scaling)
    assert none is None and past.bias is None and past.keys.shape[3] % 8 == 0
    assert torch.equal(past.values[..., :size], value)
    logits = wide.float() @ past.keys.float().transpose(2, 3) * scaling
    expected = query.float() @ key.float().transpose(2, 3) * scaling + bias[:, :, None]
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_equal_units_folded_into_one_are_attended_to_as_before():
    """Twice the same token with the same key and value: one that counts for two is the same."""
    torch.manual_seed(0)
    key, value, query = (torch.randn(1, 1, 5, 8) for _ in range(3))
    twice = torch.cat([key, key], dim=2), torch.cat([value, value], dim=2)
    units = Mergeable(*twice, torch.arange(10)[None, None], *torch.ones(2, 1, 1, 10))
    merged = merge_evicted(units, torch.arange(5)[None, None], Merging(sinks=0, fold=True))
    assert merged.weights.tolist() == [[[2.0] * 5]]
    once = Past(key, merged.values, bias=merged.weights.log())
    ours, theirs = (
        attend_past(query, [past], (key, value), 0.3, "sdpa") for past in (once, Past(*twice))
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_folded_contexts_are_saved(tmp_path, model):
    fold = {"into": "similar", "fold": True}
    engine = locret.Engine(model, "keydiff", merging=fold, **SMALL)
    cache, question = engine.prefill(prompt(60)), prompt(4, seed=1)
    cache.save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    assert loaded.merging == Merging(fold=True)
    first = engine.generate(question, cache=cache, **GREEDY)
    assert torch.equal(engine.generate(question, cache=loaded, **GREEDY), first)
    assert "fold" not in describe_merging(Merging())


def test_folding_where_logits_are_capped_is_refused():
    with pytest.raises(ValueError, match="leave fold out"):
        locret.Engine(tiny_model("gemma2"), "keydiff", merging={"fold": True}, **SMALL)
