"""Heads and layers that share what they have, over any policy's scores, against naive twins."""

import pytest
import torch

import locret
from locret.model.hooks import as_argument
from locret.policies import POLICIES, LocretPolicy
from locret.policies.attention import SnapKVPolicy
from locret.policies.compose import AdaptiveHeads, PyramidLayers, SharedLayers
from tests import policy_reference
from tests.kept import kept_of
from tests.test_batches import assert_each_row_as_alone
from tests.tiny_models import distinct_prompt, prompt, tiny_heads, tiny_model

VOCAB = 512
SMALL = {"budget": 17, "chunk_size": 9, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"do_sample": False}
FREE = sorted(set(POLICIES) - {"locret", "full", "kvzip"})


@pytest.fixture(scope="module", params=[2, 8], ids=["GQA", "MHA"])
def model(request):
    return tiny_model("llama", num_key_value_heads=request.param, vocab_size=VOCAB)


def kept(cache, row=0):
    """Source positions by layer and head."""
    return [rows[row] for rows in kept_of(cache)]


def twin(name):
    rule = policy_reference.RULES[name]
    return rule(3, 3) if name == "snapkv" else rule()


def policy_of(name):
    return SnapKVPolicy(3, 3) if name == "snapkv" else name


NAMES = ["h2o", "keydiff", "knorm", "sirllm", "snapkv", "tova"]
KINDS = {
    "heads": (AdaptiveHeads, policy_reference.AdaptiveHeads),
    "layers": (SharedLayers, policy_reference.SharedLayers),
    "both": (
        lambda p: AdaptiveHeads(SharedLayers(p)),
        lambda r: policy_reference.AdaptiveHeads(policy_reference.SharedLayers(r)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [9, 13, None])
@pytest.mark.parametrize("name", NAMES)
def test_kept_units_are_the_twins(model, name, chunk_size, kind):
    ids = distinct_prompt(47, VOCAB)
    compose, naive = KINDS[kind]
    engine = locret.Engine(
        model, compose(policy_of(name)), budget=17, chunk_size=chunk_size, stabilizers=3
    )
    cache = engine.prefill(ids)
    expected, _ = policy_reference.read(
        model, naive(twin(name)), ids[0].tolist(), 17, chunk_size, 3
    )
    assert kept(cache) == expected
    assert sum(len(units) for layer in kept(cache) for units in layer) <= sum(
        17 * layer.keys.shape[1] for layer in cache.layers
    )


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", sorted(set(FREE) - {"pyramidkv"}))  # max pooling makes ties
def test_a_floor_of_one_is_the_policy_itself(name, positions):
    model = tiny_model("llama", vocab_size=8192)
    ids = distinct_prompt(60, 8192)
    plain, *shared = (
        locret.Engine(model, policy, positions=positions, decode_interval=4, **SMALL).generate(
            ids, max_new_tokens=20, **GREEDY
        )
        for policy in (name, AdaptiveHeads(name, floor=1), SharedLayers(name, floor=1))
    )
    for each in shared:
        assert torch.equal(each, plain)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("compose", [AdaptiveHeads, SharedLayers])
def test_padded_rows_are_as_alone(compose, positions):
    model = tiny_model("llama", vocab_size=8192)
    engine = locret.Engine(model, compose("keydiff"), positions=positions, **SMALL)
    assert_each_row_as_alone(engine, (60, 33, 27, 4), vocab=8192, max_new_tokens=12)


@pytest.mark.parametrize("compose", [AdaptiveHeads, SharedLayers, PyramidLayers])
def test_equal_rows_are_as_alone(model, compose):
    engine = locret.Engine(model, compose("keydiff"), **SMALL)
    ids = torch.cat([distinct_prompt(60, VOCAB, seed) for seed in range(3)])
    together = engine.prefill(ids)
    for row in range(3):
        assert kept(together, row) == kept(engine.prefill(ids[row : row + 1]))


@pytest.mark.parametrize("compose", [AdaptiveHeads, SharedLayers])
def test_answers_stay_bounded_and_contexts_can_be_saved(model, compose, tmp_path):
    engine = locret.Engine(model, compose("knorm"), decode_interval=3, **SMALL)
    cache = engine.prefill(prompt(60, vocab=VOCAB))
    cache.save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    snapshot = cache.snapshot()
    question = prompt(4, seed=1, vocab=VOCAB)
    first = engine.generate(question, cache=cache, max_new_tokens=40, **GREEDY)
    total = sum(len(units) for layer in kept(cache) for units in layer)
    heads = sum(layer.keys.shape[1] for layer in cache.layers)
    assert total <= heads * (17 + 4)
    cache.restore(snapshot)
    for again in (cache, loaded):
        assert torch.equal(
            engine.generate(question, cache=again, max_new_tokens=40, **GREEDY), first
        )


@pytest.mark.parametrize("compose", [AdaptiveHeads, SharedLayers])
def test_a_question_in_sight(model, compose):
    ids = distinct_prompt(47, VOCAB)
    engine = locret.Engine(model, compose("tova"), query_aware=True, **SMALL)
    cache = engine.prefill(ids[:, :40], query_ids=ids[:, 40:])
    assert cache.seen == 40
    assert max(max(units) for layer in kept(cache) for units in layer) < 40
    assert engine.generate(ids, max_new_tokens=5, **GREEDY).shape == (1, 52)


def test_pyramids_over_any_policy(model):
    engine = locret.Engine(model, PyramidLayers("keydiff", beta=4), **SMALL)
    assert engine.prefill(prompt(60, vocab=VOCAB)).report()["units"] == [30, 4]


@pytest.mark.parametrize("compose", [AdaptiveHeads, SharedLayers])
@pytest.mark.parametrize("name", ["knorm", "h2o"])
def test_quotas_and_stabilizers_stay_within_the_total(compose, name):
    model = tiny_model("llama")
    quotas = [[9, 1], [1, 1]]
    settings = {"budget": 24, "chunk_size": 32, "stabilizers": 20, "quotas": quotas}
    engine = locret.Engine(model, compose(name), decode_interval=4, **settings)
    cache, counts = engine.new_cache(250)
    with engine, engine.reading_into(cache, counts):
        for ids in prompt(250).split(32, dim=1):
            model(input_ids=ids, use_cache=True, **as_argument(model, cache))
            assert sum(int(layer.lengths.sum()) for layer in cache.layers) <= 4 * 24


def test_a_budget_of_one_unit_is_one_in_every_layer():
    model = tiny_model("llama", num_hidden_layers=3)
    for name in ("streaming_llm", "knorm"):
        engine = locret.Engine(model, SharedLayers(name), budget=1, chunk_size=7, stabilizers=0)
        assert engine.prefill(prompt(40)).report()["units"] == [1, 1, 1]


def test_pyramids_deal_out_what_quotas_say_and_share_nothing(model):
    heads = [1.0] * (model.config.num_key_value_heads - 1) + [3.0]
    settings = SMALL | {"chunk_size": 60, "quotas": [heads, heads]}
    own, over = (
        locret.Engine(model, policy, **settings).prefill(prompt(60, vocab=VOCAB))
        for policy in ("knorm", PyramidLayers("knorm", beta=1))
    )
    assert kept(own) == kept(over)


def test_over_trained_heads(model):
    heads = tiny_heads(model, query_tokens=3)
    engine = locret.Engine(model, AdaptiveHeads(LocretPolicy(heads)), **SMALL)
    assert engine.config.recorded.query_tokens == 3
    assert engine.policy.name == "locret+adaptive_heads"
    cache = engine.prefill(prompt(60, vocab=VOCAB), query_ids=prompt(3, seed=1, vocab=VOCAB))
    for layer in kept(cache):
        assert all(units[:3] == [0, 1, 2] for units in layer)


@pytest.mark.parametrize("compose", [AdaptiveHeads, SharedLayers])
@pytest.mark.parametrize("floor", [-0.1, 1.1])
def test_floors_are_shares(compose, floor):
    with pytest.raises(ValueError, match="from 0 to 1"):
        compose("knorm", floor=floor)


@pytest.mark.parametrize("merging", [None, "similar", "adjacent"])
def test_no_layer_is_left_with_nothing(merging):
    model = tiny_model("llama")
    engine = locret.Engine(
        model,
        SharedLayers("keydiff"),
        budget=1,
        chunk_size=3,
        stabilizers=0,
        local_tokens=4,
        merging=merging,
    )
    assert min(engine.prefill(prompt(60)).report()["units"]) >= 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: AdaptiveHeads("locret"), "needs heads here: give LocretPolicy"),
        (lambda: AdaptiveHeads("nope"), "policy is 'nope'; expected a Policy, or one of"),
        (lambda: PyramidLayers(None), "policy is None; expected"),
        (lambda: PyramidLayers("keydiff", beta=float("nan")), "beta is nan"),
        (lambda: SharedLayers(AdaptiveHeads("keydiff")), "turn them round"),
    ],
)
def test_what_cannot_be_composed_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()


@pytest.mark.parametrize("composed", [lambda policy: policy, AdaptiveHeads], ids=["alone", "heads"])
def test_heads_of_a_policy_bring_their_record(composed):
    model = tiny_model("llama")
    recorded = {"budget": 32, "chunk_size": 16, "stabilizers": 2, "local_tokens": 4}
    heads = tiny_heads(model, defaults=recorded, positions="original")
    engine = locret.Engine(model, composed(LocretPolicy(heads)))
    assert {name: getattr(engine.config.reading, name) for name in recorded} == recorded
    assert engine.config.reading.positions == "original"
