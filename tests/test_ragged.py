"""Heads and rows that keep each as many units as they need: bytes, answers, a naive twin."""

import weakref

import numpy as np
import pytest
import torch

import locret
from locret.cache.context import sequences_of
from locret.model.hooks import as_argument, cache_of
from locret.policies.attention import ExpectedAttentionPolicy
from locret.policies.compose import AdaptiveHeads
from locret.policies.plain import StreamingLLMPolicy
from tests import policy_reference
from tests.kept import kept_of
from tests.policy_reference import RULES, Rule
from tests.test_batches import assert_each_row_as_alone, padded
from tests.tiny_models import distinct_prompt, prompt, tiny_heads, tiny_model

VOCAB = 8192  # distinct tokens: equal ones would score alike in the first layer
SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
QUOTAS = np.array([[1.0, 6.0], [0.2, 3.0]])
COUNTS = ((8, 47), (2, 23))  # of 20 units on average
KIVI = {"name": "kivi", "bits": 8, "group": 4, "residual": 3}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=VOCAB)


def with_quotas(model, policy="keydiff", **settings):
    return locret.Engine(model, policy, quotas=QUOTAS, **SMALL | settings)


KINDS = {
    "quotas": with_quotas,
    "adaptive": lambda model, **given: locret.Engine(
        model, AdaptiveHeads("keydiff"), **SMALL | given
    ),
    "both": lambda model, **given: with_quotas(model, AdaptiveHeads("keydiff"), **given),
}
SETTINGS = {
    "compact": {},
    "original": {"positions": "original"},
    "kivi": {"quantization": KIVI},
    "kivi in original positions": {"quantization": KIVI, "positions": "original"},
    "evicted while answering": {"decode_interval": 3},
    "kivi, evicted while answering": {"decode_interval": 3, "quantization": KIVI},
    "merging": {"merging": "similar"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_setting = pytest.mark.parametrize("setting", SETTINGS)


# --- what is kept ---


class QuotaHeads(Rule):
    """A rule whose heads keep `COUNTS`."""

    def __init__(self, rule):
        self.recent, self.scores, self.after_chunk = rule.recent, rule.scores, rule.after_chunk

    def budgets(self, budget, layers):
        """Whoever holds more than its head with the fewest evicts."""
        return [min(layer) for layer in COUNTS]

    def counts(self, scores, budgets):
        return [list(layer) for layer in COUNTS]


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("chunk_size", [9, None])
@pytest.mark.parametrize("name", ["keydiff", "knorm", "streaming_llm", "random"])
def test_heads_keep_their_quotas(model, name, chunk_size, positions):
    engine = with_quotas(model, name, chunk_size=chunk_size, positions=positions)
    cache = engine.prefill(distinct_prompt(90, VOCAB))
    assert [[len(head) for head in row] for (row,) in kept_of(cache)] == [*map(list, COUNTS)]
    report = cache.report(heads=True)
    assert report["head_units"] == [[[*layer]] for layer in COUNTS]
    assert report["units"] == [sum(layer) / 2 for layer in COUNTS]
    assert (report["most_units"], report["least_units"]) == ([47, 23], [8, 2])
    assert report["budget"] == COUNTS


TWINS = {  # with no more sinks, which score alike, than the smallest head keeps units
    "keydiff": ("keydiff", RULES["keydiff"]()),
    "knorm": ("knorm", RULES["knorm"]()),
    "streaming_llm": (StreamingLLMPolicy(sinks=2), RULES["streaming_llm"](sinks=2)),
    "expected_attention": (
        ExpectedAttentionPolicy(sinks=2),
        RULES["expected_attention"](sinks=2),
    ),
}


@pytest.mark.parametrize("chunk_size", [9, 13, None])
@pytest.mark.parametrize("name", TWINS)
def test_kept_units_are_the_twins(model, name, chunk_size):
    ids, (policy, rule) = distinct_prompt(70, VOCAB), TWINS[name]
    engine = with_quotas(model, policy, chunk_size=chunk_size, stabilizers=0)
    expected, _ = policy_reference.read(model, QuotaHeads(rule), ids[0].tolist(), 20, chunk_size, 0)
    assert [row for (row,) in kept_of(engine.prefill(ids))] == expected


def test_heads_that_share_keep_the_last_units_that_fit(model):
    """More stabilizers than some head is given."""
    policy = AdaptiveHeads("keydiff", floor=0.0)
    engine = with_quotas(model, policy, stabilizers=20, chunk_size=30)
    ids = distinct_prompt(60, VOCAB)
    with engine:
        cache, counts = engine.new_cache(60)
        with engine.reading_into(cache, counts), torch.no_grad():
            decoder = engine.backbone.decoder
            decoder(input_ids=ids, use_cache=True, **as_argument(decoder, cache))
    for (row,), of_layer in zip(kept_of(cache), counts, strict=True):
        assert sum(map(len, row)) == sum(of_layer) // 2 * 2
        for head, count in zip(row, of_layer, strict=True):
            last = min(20 * count // (sum(of_layer) // 2), count, len(head))
            assert head[len(head) - last :] == [*range(60 - last, 60)]


def test_rows_of_different_lengths_keep_by_their_own_counts(model):
    engine = with_quotas(model)
    ids, mask = padded((90, 30, 4), vocab=VOCAB)
    cache = engine.prefill(ids, attention_mask=mask)
    for row, length in enumerate((90, 30, 4)):
        alone = engine.prefill(prompt(length, seed=row, vocab=VOCAB))
        assert [of_layer[row] for of_layer in kept_of(cache)] == [x for (x,) in kept_of(alone)]


# --- bytes ---


def assert_honest(cache):
    """Reported bytes are those of the storage, and no tensor of a context is larger than the sum of
    its sequences."""
    report = cache.report()
    tensors = [tensor for layer in cache.layers for tensor in layer.store.tensors]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    nbytes = sum(tensor.nbytes for tensor in tensors)
    assert report["total_bytes"] == nbytes == sum(report["bytes"]) == cache.nbytes
    # The storage of nothing is nowhere.
    assert sum(n for at, n in storages.items() if at) == nbytes
    for layer in cache.layers:
        context, size = layer.store.context, layer.values.shape[-1]
        if context is None:
            continue
        total = context.sequences.total
        assert total == int(layer.lengths.sum()) - layer.lengths.numel() * layer.store.tail.count
        assert context.packed.total + context.plain.total == total
        for tensor in (context.keys, context.values):
            assert tensor.numel() == context.plain.total * size
        assert all(tensor.shape == (total,) for tensor in context.exact.values())
        packed = context.packed_keys, context.packed_values
        for part in (x for x in packed if x is not None):
            assert all(len(units) == context.packed.total for units in part.units)
            assert all(tensor.numel() <= total * size for tensor in part.tensors)


@each_setting
@each_kind
def test_reported_bytes_are_those_of_the_storage(model, kind, setting):
    engine = KINDS[kind](model, **SETTINGS[setting])
    ids, mask = padded((90, 33, 4), vocab=VOCAB)
    cache = engine.prefill(ids, attention_mask=mask)
    assert_honest(cache)
    engine.generate(prompt(6, batch=3, seed=9, vocab=VOCAB), cache=cache, **GREEDY)
    assert_honest(cache)
    answered = engine.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert_honest(cache_of(answered))


def test_unequal_heads_take_the_bytes_of_equal_ones(model):
    equal = locret.Engine(model, "keydiff", **SMALL).prefill(prompt(90, vocab=VOCAB))
    unequal = with_quotas(model).prefill(prompt(90, vocab=VOCAB))
    shared = KINDS["adaptive"](model).prefill(prompt(90, vocab=VOCAB))
    assert equal.nbytes == unequal.nbytes == shared.nbytes


def test_a_short_row_takes_no_room_of_a_long_one(model):
    engine = locret.Engine(model, "keydiff", **SMALL | {"budget": None})
    ids, mask = padded((400, 10), vocab=VOCAB)
    unit = 2 * 2 * (2 * 8 * 4 + 4)  # layers, heads, key and value, position
    assert engine.prefill(ids, attention_mask=mask).nbytes == (400 + 10) * unit


# --- answers ---


@pytest.mark.parametrize("lengths", [(90, 33, 60), (70, 40, 4), (3, 60)])
@each_setting
@each_kind
def test_each_row_is_answered_as_alone(model, kind, setting, lengths):
    if "while" in setting and kind != "adaptive":
        lengths = tuple(length + 57 for length in lengths)  # rows that the quotas give as much
    engine = KINDS[kind](model, **SETTINGS[setting])
    assert_each_row_as_alone(engine, lengths, vocab=VOCAB)


@pytest.mark.xfail(
    strict=True,
    reason="a short row that keeps less than its quotas evicts its answer by a long row's counts",
)
def test_each_row_evicts_its_answer_by_its_own_counts(model):
    engine = with_quotas(model, decode_interval=3)
    assert_each_row_as_alone(engine, (90, 33), vocab=VOCAB)


@pytest.mark.parametrize("setting", ["compact", "original", "kivi"])
@each_kind
def test_beams_of_each_row_are_those_of_it_alone(model, kind, setting):
    engine = KINDS[kind](model, **SETTINGS[setting])
    assert_each_row_as_alone(engine, (60, 33), vocab=VOCAB, num_beams=3)


@each_setting
@each_kind
def test_snapshots_and_saved_contexts_go_on_alike(model, kind, setting, tmp_path):
    engine = KINDS[kind](model, **SETTINGS[setting])
    ids, mask = padded((90, 33), vocab=VOCAB)
    cache = engine.prefill(ids, attention_mask=mask)
    cache.save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    assert kept_of(loaded) == kept_of(cache)
    assert_honest(loaded)
    before, question = cache.snapshot(), prompt(6, batch=2, seed=9, vocab=VOCAB)
    first = engine.generate(question, cache=cache, **GREEDY)
    cache.save(tmp_path / "answered")
    second = engine.generate(question, cache=cache, **GREEDY)
    kept = kept_of(cache)
    cache.restore(before)
    assert torch.equal(engine.generate(question, cache=cache, **GREEDY), first)
    assert torch.equal(engine.generate(question, cache=loaded, **GREEDY), first)
    loaded = locret.RetainedCache.load(tmp_path / "answered", model)
    for again in (cache, loaded):
        assert torch.equal(engine.generate(question, cache=again, **GREEDY), second)
        assert kept_of(again) == kept


@each_kind
def test_questions_of_different_lengths_are_answered_as_alone(model, kind):
    for setting in ("compact", "original", "kivi"):
        engine = KINDS[kind](model, **SETTINGS[setting])
        ids, mask = padded((60, 33), vocab=VOCAB)
        cache = engine.prefill(ids, attention_mask=mask)
        asked, mask = padded((6, 2), vocab=VOCAB)
        together = engine.generate(asked, attention_mask=mask, cache=cache, **GREEDY)
        for row, (context, length) in enumerate(((60, 6), (33, 2))):
            alone = engine.prefill(ids[row : row + 1, -context:])
            own = engine.generate(asked[row : row + 1, -length:], cache=alone, **GREEDY)
            assert torch.equal(together[row, asked.shape[1] :], own[0, length:])


@pytest.mark.parametrize("quantization", [None, KIVI])
@each_kind
def test_answers_of_any_length_stay_bounded(model, kind, quantization):
    engine = KINDS[kind](model, decode_interval=6, quantization=quantization)
    ids, mask = padded((90, 33), vocab=VOCAB)
    cache = engine.prefill(ids, attention_mask=mask)
    question = prompt(3, batch=2, vocab=VOCAB)
    for _ in range(3):
        engine.generate(question, cache=cache, max_new_tokens=40, do_sample=False)
        assert sum(cache.report()["units"]) <= 2 * (20 + 5)
        assert_honest(cache)


def test_quotas_that_heads_record_hold_and_bring_the_question(model):
    heads = tiny_heads(model, query_tokens=3, quotas={"2": QUOTAS.tolist()})
    engine = locret.Engine(model, heads=heads, **SMALL | {"stabilizers": 0})
    cache = engine.prefill(prompt(90, vocab=VOCAB), query_ids=prompt(3, seed=1, vocab=VOCAB))
    for (row,), counts in zip(kept_of(cache), cache.budget, strict=True):
        assert [len(head) for head in row] == [*counts]
        assert all(head[:3] == [0, 1, 2][: len(head)] for head in row)
    assert_each_row_as_alone(engine, (60, 33), vocab=VOCAB)


def test_a_long_context_takes_the_sum_of_its_lengths():
    model = tiny_model("llama", max_position_embeddings=100_000)
    ids = torch.randint(3, 128, (1, 60_000), generator=torch.Generator().manual_seed(0))
    engine = with_quotas(model, "random", budget=1500, chunk_size=4096)
    cache = engine.prefill(ids)
    report = cache.report(heads=True)
    assert report["most_units"][0] > 3000 > 150 > report["least_units"][1]
    assert report["total_bytes"] == sum(layer.nbytes for layer in cache.layers)
    for layer in cache.layers:
        units = int(layer.lengths.sum())
        positions = min(units * 4, 2 * 60_000 // 8)  # or a bit for each token and head
        assert layer.nbytes == units * 2 * 8 * 4 + positions


def test_sequences_are_shared_while_they_are_in_use_and_then_gone():
    counts, device = ((1001, 77),), torch.device("cpu")
    sequences = sequences_of(counts, device)
    assert sequences_of(counts, device) is sequences and sequences.owner.shape == (1078,)
    gone = weakref.ref(sequences)
    del sequences
    assert gone() is None
