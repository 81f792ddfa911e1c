"""Where slots are reused, at compact positions, no head keeps more units of a long prompt than the
model's window has slots for, whoever deals them out."""

import pytest
import torch

import locret
from locret.cache.sizing import Sizing
from locret.engine.config import EngineConfig
from locret.engine.contexts import counts_of
from locret.heads.quotas import within_slots
from locret.policies.attention import PyramidKVPolicy
from locret.policies.compose import AdaptiveHeads, PyramidLayers, SharedLayers
from locret.policies.kvzip import KVzipPolicy
from locret.policies.plain import KNormPolicy
from locret.quantization import NO_SCHEME, make_scheme
from tests.kept import kept_of
from tests.test_batches import padded
from tests.tiny_models import prompt, tiny_model

TABLE = [[1.0, 3.0], [0.5, 1.5]]
WINDOW = 64
GREEDY = {"do_sample": False}
RUNS = {"group": 4, "residual": 3}
RECALL = {"block_size": 4, "blocks": 3, "representatives": 2}


class FirstHead(KNormPolicy):
    """Ranks all units of the first KV head of a layer above those of the others."""

    name = "first_head"

    def score(self, chunk):
        scores = super().score(chunk).clone()
        scores[:, 0] += 1000
        return scores


class Watching(FirstHead):
    """Notes how many slots each chunk takes with what is held before it."""

    def __init__(self):
        self.slots = []

    def score(self, chunk):
        self.slots.append(chunk.context_length + chunk.key.shape[2])
        return super().score(chunk)


SHARING = [AdaptiveHeads(FirstHead()), SharedLayers("knorm"), KVzipPolicy(dynamic=True)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=WINDOW)


def lengths(cache):
    """Units held, long [layers, B, H]."""
    return torch.stack([layer.lengths for layer in cache.layers])


@pytest.mark.parametrize(
    ("window", "chunk", "budget", "expected"),
    [
        (1000, 820, 100, ((67, 200), (33, 100))),  # all of the context has slots
        (900, 720, 100, ((73, 180), (37, 110))),  # one head is at its last slot
        (900, 0, 100, ((67, 200), (33, 100))),  # read at once: no slot is used twice
        (900, 1200, 100, ((67, 200), (33, 100))),
        (900, 720, 200, ((200, 200), (200, 200))),  # more than there are slots is the user's wish
        (900, 720, [90, 300], ((113, 180), (187, 300))),  # of one layer, for that layer
        (900, 899, 1, ((1, 1), (1, 1))),
    ],
)
def test_no_quota_gives_a_head_more_than_the_window_has_slots(window, chunk, budget, expected):
    sizing = Sizing(NO_SCHEME, 2, 2, 8, window=window, chunk=chunk)
    config = EngineConfig.of("knorm", stabilizers=0, budget=budget, quotas=TABLE)
    assert config.counts(KNormPolicy(), sizing, 1000) == expected


@pytest.mark.parametrize(
    ("policy", "budget", "expected"),
    [
        (PyramidKVPolicy(), 500, [744, 744, 468, 44]),  # of 968, 656, 344, 32
        (SharedLayers(PyramidKVPolicy()), 500, [744, 744, 468, 44]),
        (PyramidLayers("knorm"), 500, [744, 744, 477, 35]),  # of 975, 659, 341, 25
        (PyramidLayers("knorm"), 300, [585, 395, 205, 15]),  # all have slots
        (PyramidLayers("knorm"), 744, [744] * 4),
        (PyramidLayers("knorm"), 800, [800] * 4),  # more than there are slots is the user's wish
        (PyramidLayers("knorm"), [900, 656, 344, 32], [900, 656, 344, 32]),
    ],
)
def test_no_layer_gets_more_than_the_window_has_slots(policy, budget, expected):
    sizing = Sizing(NO_SCHEME, 4, 2, 8, window=1000, chunk=256)
    config = EngineConfig.of(policy, stabilizers=0, budget=budget)
    assert config.counts(policy, sizing, 4000) == tuple((units,) * 2 for units in expected)


@pytest.mark.parametrize("budget", ["8x", "8x bytes", "150kB"])
def test_layers_use_all_of_a_share_or_of_bytes_beside_full_ones(budget):
    policy = PyramidLayers("knorm")
    config = EngineConfig.of(policy, stabilizers=0, budget=budget)
    free, bound = (Sizing(NO_SCHEME, 4, 2, 8, window=w, chunk=256) for w in (None, 1000))
    alone, beside = (config.counts(policy, sizing, 4000) for sizing in (free, bound))
    assert max(map(max, beside)) == 744 < max(map(max, alone))
    assert sum(map(sum, beside)) == pytest.approx(sum(map(sum, alone)), abs=16)


def test_fewer_bits_give_no_layer_more_than_the_window_has_slots():
    given = {"bits": 8, "quant_layers_bits": 2}
    scheme = make_scheme("layerquant", quant_end_layers=1, **given)
    free, bound = (Sizing(scheme, 2, 2, 64, window=w, chunk=256) for w in (None, 1000))
    config, policy = EngineConfig.of("knorm", stabilizers=0, budget=500), KNormPolicy()
    (most, _), base = config.counts(policy, free, 4000)
    assert most > 744
    assert config.counts(policy, bound, 4000) == ((744, 744), base)


@pytest.mark.parametrize("quotas", [None, [[9, 1], [1, 1]]])
@pytest.mark.parametrize(("context", "question"), [(250, 10), (224, 16), (60, 10)])
def test_heads_leave_slots_for_a_last_chunk_with_a_question(model, quotas, context, question):
    watching = Watching()
    policy = watching if quotas else AdaptiveHeads(watching)
    settings = {"budget": 24, "chunk_size": 16, "stabilizers": 2, "quotas": quotas}
    engine = locret.Engine(model, policy, query_aware=True, **settings)
    engine.prefill(prompt(context), query_ids=prompt(question, seed=1))
    assert max(watching.slots) == WINDOW  # all are used, and none beyond
    watching.slots.clear()
    cache = engine.prefill(prompt(40), query_ids=prompt(question, seed=1))
    assert max(watching.slots) <= WINDOW
    assert lengths(cache).sum() == 4 * 24


@pytest.mark.parametrize("length", [400, 700, 1001, 1103])
def test_a_chosen_chunk_leaves_slots_for_a_question_in_sight(length):
    model, watching = tiny_model("llama", max_position_embeddings=600), Watching()
    sizes = []
    for aware in (False, True):
        engine = locret.Engine(model, watching, query_aware=aware, budget=80, chunk_size="auto")
        sizes.append(engine.config.reading.chunk_size)
        engine.generate(prompt(length), max_new_tokens=1, **GREEDY)
        question = {"query_ids": prompt(100, seed=1)} if aware else {}
        engine.prefill(prompt(length), **question)
    assert max(watching.slots) <= 600
    assert sizes == [512, 256]


@pytest.mark.parametrize("policy", ["knorm", *SHARING[:2]])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_heads_leave_slots_for_a_chunk_where_slots_are_reused(model, policy, positions):
    settings = {"budget": 24, "chunk_size": 32, "stabilizers": 2, "quotas": [[9, 1], [1, 1]]}
    engine = locret.Engine(model, policy, positions=positions, **settings)
    held = lengths(engine.prefill(prompt(250)))
    assert positions == "original" or held.max() <= 32
    if not isinstance(policy, SharedLayers):
        assert positions == "compact" or held.max() > 32
        assert held.sum() == 4 * 24


@pytest.mark.parametrize("chunk_size", [32, 48])
@pytest.mark.parametrize("policy", SHARING)
def test_a_budget_above_the_slots_is_kept(model, policy, chunk_size):
    engine = locret.Engine(model, policy, budget=40, chunk_size=chunk_size, stabilizers=2)
    assert lengths(engine.prefill(prompt(250))).tolist() == [[[40, 40]]] * 2


def test_answers_leave_slots_for_what_comes_before_the_next_eviction(model):
    settings = {"budget": 40, "chunk_size": 32, "stabilizers": 2, "local_tokens": 4}
    engine = locret.Engine(model, AdaptiveHeads(FirstHead()), decode_interval=8, **settings)
    for length in (40, 250):  # of which the window holds one, but not its answer
        cache = engine.prefill(prompt(length))
        for seed in range(3):
            engine.generate(prompt(3, seed=seed), cache=cache, max_new_tokens=20 + seed, **GREEDY)
            assert lengths(cache).max() <= WINDOW
            assert lengths(cache).sum() <= 4 * (40 + 8)


def test_rows_that_the_window_holds_are_read_as_alone():
    model = tiny_model("llama", max_position_embeddings=100)
    settings = {"budget": 40, "chunk_size": 48, "stabilizers": 2}
    engine = locret.Engine(model, AdaptiveHeads(FirstHead()), **settings)
    given = (200, 100)
    both = kept_of(engine.prefill(*padded(given)))
    for row, length in enumerate(given):
        alone = kept_of(engine.prefill(prompt(length, seed=row)))
        assert [layer[row] for layer in both] == [layer[0] for layer in alone]


@pytest.mark.parametrize("interval", [8, 24])
@pytest.mark.parametrize("length", [60, 250])
@pytest.mark.parametrize(
    ("wrapped", "settings"),
    [
        (None, {"budget": 20, "quotas": [[9, 1], [1, 1]]}),
        (None, {"budget": 20, "quotas": [[9, 1], [1, 1]], "chunk_size": None}),
        (None, {"budget": "12x", "quotas": [[9, 1], [1, 1]]}),
        (None, {"budget": "3kB", "quotas": [[9, 1], [1, 1]]}),
        (None, {"budget": "3kB", "quotas": [[9, 1], [1, 1]], "chunk_size": None}),
        (PyramidLayers, {"budget": 30}),
        (PyramidLayers, {"budget": 30, "chunk_size": 4}),
        (AdaptiveHeads, {"budget": 20}),
    ],
    ids=str,
)
def test_answers_with_evictions_stay_within_the_window(model, wrapped, settings, length, interval):
    watching = Watching()
    policy = wrapped(watching) if wrapped else watching
    settings = {"chunk_size": 16, "stabilizers": 2, "local_tokens": 3} | settings
    engine = locret.Engine(model, policy, decode_interval=interval, **settings)
    cache = engine.prefill(prompt(length))
    watching.slots.clear()
    for seed, asked in enumerate((3, 3, 1)):
        engine.generate(prompt(asked, seed=seed), cache=cache, max_new_tokens=70, **GREEDY)
        assert max(watching.slots) <= WINDOW


@pytest.mark.parametrize("length", [60, 64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("wrapped", "settings"),
    [
        (None, {"budget": 20, "quotas": [[9, 1], [1, 1]]}),
        (None, {"budget": 20, "quotas": [[9, 1], [1, 1]], "merging": "similar"}),
        (None, {"budget": 20, "quotas": [[9, 1], [1, 1]], "quantization": {"name": "kivi"} | RUNS}),
        (None, {"budget": 20, "quotas": [[9, 1], [1, 1]], "recall": RECALL}),
        (None, {"budget": "3kB", "quotas": [[9, 1], [1, 1]]}),
        (PyramidLayers, {"budget": 40}),
        (PyramidLayers, {"budget": 40, "recall": RECALL}),
        (AdaptiveHeads, {"budget": 20, "recall": RECALL}),
        (SharedLayers, {"budget": 20, "recall": RECALL}),
        (AdaptiveHeads, {"budget": 20}),
        (SharedLayers, {"budget": 20}),
    ],
    ids=str,
)
def test_heads_make_room_for_questions_that_the_window_has_none_for(
    model, wrapped, settings, batch, length
):
    """Of 10 tokens and 20, about a context that it holds whole, and about an answer."""
    watching, interval = Watching(), 4
    policy = wrapped(watching) if wrapped else watching
    settings = {"chunk_size": 16, "stabilizers": 2, "local_tokens": 3} | settings
    engine = locret.Engine(model, policy, decode_interval=interval, **settings)
    cache = engine.prefill(prompt(length, batch=batch))
    watching.slots.clear()
    for seed, asked in enumerate((1, 10, 20)):
        question = prompt(asked, batch=batch, seed=seed)
        engine.generate(question, cache=cache, max_new_tokens=30, **GREEDY)
        assert max(watching.slots, default=0) <= WINDOW
        assert lengths(cache).max() <= WINDOW
        counts = counts_of(cache.budget, 2, 2)
        assert lengths(cache).sum(dim=(0, 2)).max() <= sum(map(sum, counts)) + 4 * interval


@pytest.mark.parametrize("budget", [52, [52, 20]])
def test_a_budget_that_answers_have_no_slots_for_is_kept(model, budget):
    settings = {"budget": budget, "chunk_size": 8, "stabilizers": 2, "decode_interval": 20}
    engine = locret.Engine(model, "knorm", **settings)
    cache = engine.prefill(prompt(250))
    engine.generate(prompt(3), cache=cache, max_new_tokens=70, **GREEDY)
    assert lengths(cache)[0].min() >= 52


def test_answers_that_the_window_holds_keep_what_was_kept(model):
    settings = {"budget": 24, "chunk_size": 16, "stabilizers": 2, "quotas": [[9, 1], [1, 1]]}
    engine = locret.Engine(model, "knorm", decode_interval=8, **settings)
    cache = engine.prefill(prompt(50))
    kept = lengths(cache)
    engine.generate(prompt(3), cache=cache, max_new_tokens=7, **GREEDY)
    assert (lengths(cache) >= kept).all()


@pytest.mark.parametrize("by_layer", [True, False])
def test_units_above_the_slots_go_to_other_heads(by_layer):
    assert within_slots(((30, 10), (20, 20)), 30, by_layer) == ((30, 10), (20, 20))
    assert within_slots(((70, 10), (20, 20)), 50, by_layer) == ((50, 14), (28, 28))
    above = within_slots(((70, 50), (20, 20)), 40, by_layer)
    assert above == (((60, 56), (22, 22)) if by_layer else ((40, 40), (40, 40)))
