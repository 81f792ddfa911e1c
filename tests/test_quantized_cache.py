"""A cache in few bits works wherever one in full precision does, and says what it really takes."""

import pytest
import torch

import locret
from locret.engine import reading
from locret.model.hooks import cache_of
from locret.policies import POLICIES
from locret.policies.compose import AdaptiveHeads, SharedLayers
from locret.quantization import SCHEMES, make_scheme, packed, scheme_of, waiting
from tests.test_batches import padded
from tests.tiny_models import (
    FAMILIES,
    HEAD_SIZE,
    distinct_prompt,
    prompt,
    tiny_heads,
    tiny_model,
)

VOCAB = 4096  # so many words that no two tokens of a prompt are equal and score alike
SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
RUNS = {"group": 4, "residual": 3}
PACKING = sorted(name for name, scheme in SCHEMES.items() if scheme.packs)
NEAR = {"name": "kivi", "bits": 8} | RUNS
CODED = [{"name": name} | RUNS for name in PACKING if name != "layerquant"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=VOCAB)


def engine_of(model, policy="locret", **settings):
    heads = tiny_heads(model) if policy == "locret" else None
    return locret.Engine(model, policy, heads=heads, **SMALL | settings)


def logits_of(engine, ids, steps=1, **kwargs):
    """Of the first steps of the answer, [steps, B, V]."""
    return answer(engine, ids, steps, **kwargs)[0]


def answer(engine, ids, steps=1, **kwargs):
    """Logits of the first steps, and the cache after them."""
    output = engine.generate(
        ids,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return torch.stack(output.logits), cache_of(output)


def distance(one, other):
    return float((one - other).norm() / other.norm())


def share_of_same_units(one, other):
    kept = [
        [set(head.tolist()) for layer in cache.layers for head in layer.source_positions[0]]
        for cache in (one, other)
    ]
    return sum(len(a & b) for a, b in zip(*kept, strict=True)) / sum(map(len, kept[0]))


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("none", [None, "none", {"name": "kivi", "bits": 16}, make_scheme("none")])
def test_no_quantization_changes_nothing(model, positions, none):
    ids = prompt(63)
    plain = engine_of(model, positions=positions)
    engine = engine_of(model, positions=positions, quantization=none)
    assert torch.equal(logits_of(engine, ids, 8), logits_of(plain, ids, 8))
    report = engine.prefill(ids).report()
    assert report == plain.prefill(ids).report()
    assert report["quantization"] is None


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_eight_bits_are_near(model, policy, positions):
    for length, budget in ((63, 20), (18, 40), (6, 20), (1, 20), (40, 1)):
        ids = distinct_prompt(length, VOCAB)
        settings = {"positions": positions, "budget": budget, "stabilizers": min(3, budget)}
        plain = engine_of(model, policy, **settings)
        engine = engine_of(model, policy, quantization=NEAR, **settings)
        (near, coded), (exact, full) = answer(engine, ids), answer(plain, ids)
        assert coded.report()["units"] == full.report()["units"]
        same = share_of_same_units(coded, full)
        assert same > 0.7  # of units that rank alike, a trifle decides which stay
        if same == 1:
            assert distance(near, exact) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture(family):
    model = tiny_model(family, vocab_size=VOCAB)
    ids = distinct_prompt(45, VOCAB)
    near = logits_of(engine_of(model, "streaming_llm", quantization=NEAR), ids, 3)
    assert distance(near, logits_of(engine_of(model, "streaming_llm"), ids, 3)) < 0.1


def test_fewer_bits_are_farther(model):
    ids = distinct_prompt(63, VOCAB)
    plain = logits_of(engine_of(model, "streaming_llm"), ids)
    away = [
        distance(logits_of(engine_of(model, "streaming_llm", quantization=scheme), ids), plain)
        for scheme in ({"name": "kivi", "bits": bits} | RUNS for bits in (8, 4, 2))
    ]
    assert away == sorted(away)
    assert away[0] < away[2] / 10


@pytest.mark.parametrize("scheme", CODED, ids=lambda scheme: scheme["name"])
def test_nothing_evicted(model, scheme):
    ids = distinct_prompt(63, VOCAB)
    plain = locret.Engine(model, "full", chunk_size=7)
    engine = locret.Engine(model, "full", chunk_size=7, quantization=scheme)
    assert distance(logits_of(engine, ids), logits_of(plain, ids)) < 0.5
    report = engine.prefill(ids).report()
    assert report["units"] == [63, 63]
    assert report["kv_bytes"] < plain.prefill(ids).report()["kv_bytes"]
    assert report["full_cache_bytes"] == plain.prefill(ids).report()["full_cache_bytes"]


def test_a_chunk_is_seen_as_it_is_by_itself(model):
    ids = distinct_prompt(30, VOCAB)
    scheme = {"name": "kivi", "bits": 2, "group": 4, "residual": 0}
    engine = locret.Engine(model, "full", chunk_size=None, local_tokens=30, quantization=scheme)
    plain = locret.Engine(model, "full", chunk_size=None, local_tokens=30)
    assert torch.equal(logits_of(engine, ids), logits_of(plain, ids))


def unpacked(layer):
    """Units of each head that stand as they came."""
    plain = layer.store.context.plain
    assert plain.equal
    return plain.longest + layer.store.tail.count


@pytest.mark.parametrize("scheme", CODED, ids=lambda scheme: scheme["name"])
def test_the_device_attends_while_the_host_waits_to_pack(model, scheme, monkeypatch):
    attended = []

    def from_device(x):
        before = len(attended)
        host = waiting.from_device(x)
        waits.append(len(attended) - before)
        return host

    def attend_past(*args, **given):
        attended.append(args)
        return attending(*args, **given)

    waits, attending = [], reading.attend_past
    monkeypatch.setattr(packed, "from_device", from_device)
    monkeypatch.setattr(reading, "attend_past", attend_past)
    engine_of(model, quantization=scheme).prefill(prompt(60))
    assert len(waits) > 8
    assert waits == [1, 0] * (len(waits) // 2)  # of a context, the last layer only stores


@pytest.mark.parametrize("scheme", CODED, ids=lambda scheme: scheme["name"])
def test_answers_are_packed_as_they_come(model, scheme):
    engine = engine_of(model, quantization=scheme)
    cache = engine.prefill(prompt(60))
    engine.generate(prompt(3), cache=cache, max_new_tokens=40, do_sample=False)
    for layer in cache.layers:
        assert (layer.lengths == 20 + 42).all()
        assert unpacked(layer) < RUNS["residual"] + RUNS["group"]
        assert layer.rotated


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("settings", [{}, {"positions": "original"}, {"decode_interval": 4}])
def test_every_question_sees_the_untouched_context(model, name, settings):
    ends = {"quant_end_layers": 1} if name == "layerquant" else {}
    engine = engine_of(model, quantization={"name": name} | RUNS | ends, **settings)
    cache = engine.prefill(prompt(60))
    context, nbytes = cache.snapshot(), cache.nbytes
    for seed in (1, 2, 1):
        question = prompt(4, seed=seed)
        given = engine.generate(question, cache=cache, **GREEDY)
        fresh = engine.generate(question, cache=engine.prefill(prompt(60)), **GREEDY)
        assert torch.equal(given, fresh)
        cache.restore(context)
        assert cache.nbytes == nbytes


@pytest.mark.parametrize("quantization", [None, NEAR])
def test_snapshots_on_both_sides_of_another_answer(model, quantization):
    engine = engine_of(model, quantization=quantization)
    cache = engine.prefill(prompt(60))
    engine.generate(prompt(4, seed=1), cache=cache, **GREEDY)
    here = cache.snapshot()
    engine.generate(prompt(4, seed=2), cache=cache, **GREEDY)
    there = cache.snapshot()
    expected = engine.generate(prompt(4, seed=3), cache=cache, **GREEDY)
    cache.restore(here)
    engine.generate(prompt(4, seed=4), cache=cache, **GREEDY)
    cache.restore(there)
    assert torch.equal(engine.generate(prompt(4, seed=3), cache=cache, **GREEDY), expected)


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("turns", [0, 1])
def test_saved_and_loaded(model, tmp_path, name, turns):
    ends = {"quant_end_layers": 1} if name == "layerquant" else {}
    engine = engine_of(model, quantization={"name": name} | RUNS | ends)
    cache = engine.prefill(prompt(60))
    for _ in range(turns):
        engine.generate(prompt(3), cache=cache, **GREEDY)
    cache.save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    before, after = cache.report(), loaded.report()
    assert after["quantization"] == before["quantization"]
    assert after["quantization"]["name"] == name
    assert after["kv_bytes"] <= before["kv_bytes"]  # spare room is not saved
    question = prompt(4, seed=5)
    given = engine.generate(question, cache=loaded, **GREEDY)
    assert torch.equal(given, engine.generate(question, cache=cache, **GREEDY))


def test_saving_a_scheme_that_loading_cannot_know(model, tmp_path):
    class Mine(SCHEMES["kivi"]):
        name = "mine"

    cache = engine_of(model, quantization=Mine()).prefill(prompt(60))
    assert cache.report()["quantization"]["name"] == "mine"
    with pytest.raises(ValueError, match="Mine is not in locret.quantization.SCHEMES"):
        cache.save(tmp_path / "context")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", CODED, ids=lambda scheme: scheme["name"])
@pytest.mark.parametrize("lengths", [(60, 33), (41, 60, 47, 5, 1, 6), (4, 3, 1), (30, 2), (12, 13)])
def test_rows_of_different_lengths_hold_what_they_would_alone(model, scheme, lengths):
    engine = engine_of(model, quantization=scheme)
    ids, mask = padded(lengths, vocab=VOCAB)
    cache = engine.prefill(ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = engine.prefill(prompt(length, seed=row, vocab=VOCAB))
        for layer, single in zip(cache.layers, alone.layers, strict=True):
            first = layer.longest - single.longest
            # Products of matrices round by how many rows there are; codes are as alone.
            near = {"atol": 1e-5, "rtol": 1e-5}
            torch.testing.assert_close(layer.keys[row, :, first:], single.keys[0], **near)
            torch.testing.assert_close(layer.values[row, :, first:], single.values[0], **near)
            assert torch.equal(layer.lengths[row], single.lengths[0])


@pytest.mark.parametrize("settings", [{}, {"positions": "original"}, {"decode_interval": 4}])
def test_padded_rows_are_answered_as_alone(model, settings):
    engine = engine_of(model, "streaming_llm", quantization=NEAR, **settings)
    lengths = (60, 33, 4, 21)
    ids, mask = padded(lengths, vocab=VOCAB)
    together = logits_of(engine, ids, 12, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = logits_of(engine, prompt(length, seed=row, vocab=VOCAB))
        assert distance(together[0, row], alone[0, 0]) < 0.05
    assert together.isfinite().all()


def test_beams(model):
    ids = distinct_prompt(40, VOCAB)
    answer = {"num_beams": 3, "max_new_tokens": 9, "do_sample": False}
    coded = engine_of(model, "streaming_llm", quantization=NEAR).generate(ids, **answer)
    plain = engine_of(model, "streaming_llm").generate(ids, **answer)
    assert coded.shape == plain.shape


@pytest.mark.parametrize("scheme", CODED, ids=lambda scheme: scheme["name"])
def test_answers_of_any_length_stay_bounded(model, scheme):
    engine = engine_of(model, "random", quantization=scheme, decode_interval=6)
    cache = engine.prefill(prompt(60))
    for _ in range(3):
        engine.generate(prompt(3), cache=cache, max_new_tokens=40, do_sample=False)
        assert max(cache.report()["units"]) <= 25


def test_one_budget_for_each_layer(model):
    engine = engine_of(model, "random", quantization=NEAR, budget=[9, 30])
    cache = engine.prefill(prompt(60))
    assert cache.report()["units"] == [9, 30]
    engine.generate(prompt(4), cache=cache, **GREEDY)


@pytest.mark.parametrize("wrapped", [AdaptiveHeads, SharedLayers])
def test_heads_and_layers_that_keep_different_numbers(model, wrapped):
    ids = distinct_prompt(63, VOCAB)
    settings = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
    engine = locret.Engine(model, wrapped("knorm"), quantization=NEAR, **settings)
    plain = locret.Engine(model, wrapped("knorm"), **settings)
    (near, coded), (exact, full) = answer(engine, ids, 5), answer(plain, ids, 5)
    same = share_of_same_units(coded, full)
    assert same > 0.9
    assert same < 1 or distance(near[0], exact[0]) < 0.1
    assert near.isfinite().all()


def test_layerquant_moves_units_between_layers(model):
    scheme = {"name": "layerquant", "bits": 2, "quant_end_layers": 1, "group": 8, "residual": 0}
    engine = engine_of(model, "random", quantization=scheme, budget=64)
    first, second = engine.prefill(prompt(200)).report()["units"]
    assert first < second == 64
    fixed = engine_of(model, "random", quantization=scheme, budget=[30, 30])
    assert fixed.prefill(prompt(200)).report()["units"] == [30, 30]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gptq", "no quantization 'gptq'"),
        ({"bits": 4}, "expected one of"),
        (4, "expected one of"),
        ({"name": "kivi", "bits": 3}, "bits is 3"),
        ({"name": "gptq", "bits": 16}, "no quantization 'gptq'"),
        ({"name": "kivi", "size": 3}, "has no option size"),
    ],
)
def test_what_is_no_scheme_is_refused(model, given, message):
    with pytest.raises(ValueError, match=message):
        engine_of(model, quantization=given)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("policy", ["random", "streaming_llm"])
def test_four_bits_take_at_most_0_30_of_sixteen(size, policy):
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1}
    shape |= {"num_key_value_heads": 1, "head_dim": size, "max_position_embeddings": 8192}
    model = tiny_model("llama", **shape).bfloat16()
    settings = {"budget": 2048, "chunk_size": 700, "stabilizers": 100}
    given = [
        locret.Engine(model, policy, quantization=scheme, **settings).prefill(prompt(6000)).report()
        for scheme in ("kivi", None)
    ]
    coded, plain = given
    assert coded["units"] == plain["units"] == [2048]
    assert coded["kv_bytes"] <= 0.30 * plain["kv_bytes"]
    assert plain["kv_bytes"] == 2048 * 2 * size * 2


BYTES = 60_000


@pytest.mark.parametrize("policy", ["random", "pyramidkv"])
@pytest.mark.parametrize("name", [None, *PACKING])
@pytest.mark.parametrize("budget", [f"{BYTES}B", "60kB"])
def test_a_budget_in_bytes(model, policy, name, budget):
    ends = {"quant_end_layers": 1} if name == "layerquant" else {}
    scheme = {"name": name, "group": 8, "residual": 4} | ends if name else None
    settings = {"chunk_size": 50, "stabilizers": 3, "local_tokens": 5, "quantization": scheme}
    ids = distinct_prompt(900, VOCAB)
    engine = locret.Engine(model, policy, budget=budget, **settings)
    report = engine.prefill(ids).report()
    outliers = 30_000 if name == "kvquant" else 0
    assert report["total_bytes"] <= BYTES + outliers
    assert report["total_bytes"] > 0.85 * BYTES or min(report["units"]) == 900  # all of them
    again = locret.Engine(model, policy, budget=report["units"], **settings).prefill(ids).report()
    assert again["units"] == report["units"]


def test_a_context_that_fits_stays_within_the_bytes_too(model):
    engine = locret.Engine(
        model, "random", budget=f"{BYTES}B", chunk_size=50, quantization={"name": "kivi"} | RUNS
    )
    units = max(engine.prefill(distinct_prompt(900, VOCAB)).report()["units"])
    report = engine.prefill(distinct_prompt(units, VOCAB)).report()
    assert report["units"] == [units, units]
    assert report["total_bytes"] <= BYTES


def test_bytes_for_nothing_are_refused(model):
    with pytest.raises(ValueError, match="one unit in every KV head takes"):
        locret.Engine(model, "random", budget="100B").prefill(prompt(60))
    with pytest.raises(ValueError, match="expected at least 1"):
        locret.Engine(model, "random", budget_bytes=0)
    with pytest.raises(ValueError, match="amount of memory"):
        locret.Engine(model, "random", budget_bytes="2 GiBs")
    with pytest.raises(ValueError, match="'0MiB' is less than 1; expected an amount of memory"):
        locret.Engine(model, "random", budget="0MiB")
    with pytest.raises(ValueError, match="give budget alone"):
        locret.Engine(model, "random", budget=20, budget_bytes="2GiB")


def test_scheme_of_gives_back_schemes():
    scheme = make_scheme("kivi", bits=2)
    assert scheme_of(scheme) is scheme
    assert scheme_of({"name": "kivi", "bits": 2}) == scheme


# --- key biases ---


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", [name for name in PACKING if name != "layerquant"])
def test_no_scheme_minds_a_large_key_bias(name, positions):
    """A few channels of Qwen2 keys are hundreds high and turn slowly."""
    model = tiny_model("qwen2", vocab_size=VOCAB)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[HEAD_SIZE // 2 - 1] = 354.0
    plain = engine_of(model, "streaming_llm", positions=positions)
    scheme = {"name": name, "bits": 8} | RUNS
    engine = engine_of(model, "streaming_llm", positions=positions, quantization=scheme)
    ids = prompt(60)
    assert distance(logits_of(engine, ids), logits_of(plain, ids)) < 0.1
