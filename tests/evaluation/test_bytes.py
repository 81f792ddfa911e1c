"""Budgets at equal bytes: a share of a full 16-bit cache's, however the cache is stored."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import locret
from locret.engine.engine import Engine
from locret.evaluation import evaluate
from locret.evaluation.ask import Ranks
from locret.evaluation.config import EvalConfig, Setup
from locret.evaluation.records import Records
from locret.policies.compose import AdaptiveHeads, SharedLayers
from locret.quantities import ByteShare
from tests.evaluation.eval_data import DATA, write_data
from tests.tiny_models import prompt, tiny_model

HEAD_DIM = 32
KIVI = {"name": "kivi", "bits": 4, "group": 8, "residual": 0}
ROTATED = {"name": "rotated", "group": 16}
LENGTH, RATIOS, TASKS = 400, (4, 8), ("passkey", "niah_single")


def allowed(ratio, head_dim=HEAD_DIM, tokens=LENGTH):
    """A share of the bytes of keys and values in 16 bits: two layers of two heads."""
    return tokens * 2 * 2 * 2 * head_dim * 2 // ratio


def plain_units(ratio, head_dim=HEAD_DIM, tokens=LENGTH):
    """Units in 16 bits that fit into it, beside a bit a token for their source positions."""
    return (allowed(ratio, head_dim, tokens) // 4 - -(-tokens // 8)) // (4 * head_dim)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer), head_dim=HEAD_DIM).bfloat16()


EXAMPLE = {
    "lengths": [67],
    "chunk_size": 33,
    "quotas": [[1, 9], [9, 1]],
    "quantization": KIVI | {"residual": 5},
    "positions": "compact",
    "ratio": 8,
    "policy": AdaptiveHeads("knorm"),
    "decode_interval": None,
}

# ---- engines and setups --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [64, None])
@pytest.mark.parametrize(
    ("head_dim", "group", "more"), [(64, 64, 3.0), (32, 32, 2.5), (32, 8, 1.7)]
)
def test_four_bits_hold_more_units_within_the_bytes_of_sixteen(head_dim, group, more, chunk_size):
    """Three times as many, with the groups that are the default of `grid`."""
    model = tiny_model("llama", head_dim=head_dim).bfloat16()
    settings = {"budget": "4x bytes", "chunk_size": chunk_size, "stabilizers": 0}
    held, sizes = [], []
    for quantization in (None, KIVI | {"group": group}):
        engine = locret.Engine(model, "knorm", quantization=quantization, **settings)
        report = engine.prefill(prompt(LENGTH)).report()
        held.append(max(report["units"]))
        sizes.append(report["total_bytes"])
    assert held[0] == plain_units(4, head_dim)
    assert held[1] >= more * held[0]
    assert all(0.9 * allowed(4, head_dim) < size <= allowed(4, head_dim) for size in sizes)


@pytest.mark.parametrize("policy", ["knorm", "pyramidkv"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("ratio", [2, 13, 50])
def test_never_more_bytes_than_in_sixteen_bits(ratio, bits, policy, model):
    settings = {"budget": f"{ratio}x bytes", "chunk_size": None, "stabilizers": 0}
    engine = locret.Engine(model, policy, quantization=KIVI | {"bits": bits}, **settings)
    report = engine.prefill(prompt(LENGTH)).report()
    assert 0 < report["total_bytes"] <= allowed(ratio)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(60, 400), min_size=1, max_size=2),
    chunk_size=st.sampled_from([33, 64, 150, None]),
    quotas=st.none()
    | st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=2, max_size=2),
    quantization=st.sampled_from([None, KIVI, KIVI | {"residual": 5}, ROTATED]),
    positions=st.sampled_from(["compact", "original"]),
    ratio=st.integers(2, 12),
    policy=st.sampled_from(["knorm", AdaptiveHeads("knorm"), SharedLayers("keydiff", 0.0)]),
    decode_interval=st.sampled_from([None, 8]),
)
@example(**EXAMPLE)
@example(**EXAMPLE | {"lengths": [60], "policy": SharedLayers("keydiff", 0.0)})
@example(**EXAMPLE | {"ratio": 6, "decode_interval": 8})  # a head could have held all
def test_what_was_read_takes_at_most_its_share(
    lengths, chunk_size, quotas, quantization, positions, ratio, policy, decode_interval, model
):
    engine = locret.Engine(
        model,
        policy,
        decode_interval=decode_interval,
        budget=f"{ratio}x bytes",
        quotas=quotas,
        chunk_size=chunk_size,
        stabilizers=0,
        positions=positions,
        quantization=quantization,
    )
    ids = prompt(max(lengths), batch=len(lengths))
    mask = torch.tensor([[n >= max(lengths) - i for i in range(max(lengths))] for n in lengths])
    cache = engine.prefill(ids, attention_mask=mask.long())
    assert cache.nbytes <= sum(allowed(ratio, tokens=n) for n in lengths)


def test_layers_with_a_window_come_on_top():
    """They hold what they hold under every policy."""
    model = tiny_model("exaone4", head_dim=HEAD_DIM).bfloat16()
    units = []
    for budget in ("4x bytes", plain_units(4)):
        engine = locret.Engine(model, "knorm", budget=budget, chunk_size=64, stabilizers=0)
        units.append(engine.prefill(prompt(LENGTH)).report()["units"])
    assert units[0] == units[1] and max(units[0]) == plain_units(4)


def test_the_share_is_of_the_prompt(model):
    engine = locret.Engine(model, "knorm", budget="4x bytes", chunk_size=64, stabilizers=0)
    units = engine.prefill(prompt(200)).report()["units"]
    assert max(units) == plain_units(4, tokens=200)


def test_at_least_one_unit_a_head_is_kept(model):
    engine = locret.Engine(model, "knorm", budget="50x bytes", chunk_size=64, stabilizers=0)
    assert engine.prefill(prompt(20)).report()["units"] == [1, 1]


def test_a_model_in_32_bits_keeps_fewer_units_in_the_same_bytes(tokenizer):
    wide = tiny_model("llama", vocab_size=len(tokenizer), head_dim=HEAD_DIM)
    engine = locret.Engine(wide, "knorm", budget="4x bytes", chunk_size=64, stabilizers=0)
    report = engine.prefill(prompt(LENGTH)).report()
    assert report["total_bytes"] <= allowed(4) and 40 < max(report["units"]) < 60


def test_bytes_are_a_share_of_those_of_the_sample_whatever_the_length_of_its_task():
    setup = Setup("knorm", "8x bytes", quantization=KIVI)
    assert setup.engine_budget(400) == setup.engine_budget(None) == ByteShare(1 / 8)
    assert Setup("full", "8x bytes").engine_budget(400) is None
    assert setup.label == "knorm 8x bytes query_agnostic kivi bits=4 group=8 residual=0"
    assert str(setup.engine_budget(None)) == str(setup.engine_budget(400)) == "8x bytes"


# ---- evaluations ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_config(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    budgets = [f"{ratio}x bytes" for ratio in RATIOS]
    return EvalConfig(
        model=str(folder / "backbone"),
        tasks=TASKS,
        setups=(
            {"policy": "full", "quantization": [None, KIVI]},
            {"policy": "knorm", "budget": budgets, "quantization": [None, KIVI]},
        ),
        output=str(folder / "whole"),
        dtype="bfloat16",
        device="cpu",
        lengths=(LENGTH,),
        depths=3,
        limit=3,
        max_new_tokens=2,
        seed=0,
        engine={"chunk_size": 64, "stabilizers": 0},
    )


@pytest.fixture(scope="module")
def whole(whole_config):
    return json.loads(evaluate.run(whole_config).read_text())


@pytest.fixture
def config(whole_config, tmp_path):
    return replace(whole_config, output=str(tmp_path / "out"))


def records(config):
    return list(Records(Path(config.output)).read().values())


def test_every_sample_is_asked_under_every_setup(whole, whole_config):
    setups = [(s["policy"], s["budget"], s["quantization"]) for s in whole["setups"]]
    assert setups == [
        ("full", None, None),
        ("full", None, KIVI),
        *(("knorm", f"{ratio}x bytes", stored) for ratio in RATIOS for stored in (None, KIVI)),
    ]
    asked = Counter((r.setup, r.task, r.sample) for r in records(whole_config))
    assert len(asked) == 6 * 6 and set(asked.values()) == {1}


def check_bytes(result):
    for cell in result["cells"]:
        if cell["policy"] == "knorm":
            ratio = int(cell["budget"].partition("x")[0])
            # Of a sample's own tokens, which are nearly as many as its task is made to.
            assert 0.75 * allowed(ratio) < cell["bytes"]["max"] <= allowed(ratio)
            assert (cell["units"]["max"] > plain_units(ratio)) == (cell["quantization"] == KIVI)


def test_bytes_are_equal_and_units_are_not(whole):
    check_bytes(whole)
    units = {
        setup["setup"]: setup["units"]["max"]
        for setup in whole["setups"]
        if setup["policy"] == "knorm"
    }
    four, four_in_kivi, eight, eight_in_kivi = units.values()
    assert 0.85 * plain_units(8) < eight <= plain_units(8) and abs(four - 2 * eight) <= 2
    assert four_in_kivi >= 1.7 * four and eight_in_kivi >= 1.7 * eight


def test_batches_ask_the_same_within_the_same_bytes(whole, whole_config, config):
    result = json.loads(evaluate.run(replace(config, batch_size=4)).read_text())
    asked = sorted((r.setup, r.task, r.sample, r.prompt_tokens) for r in records(config))
    assert asked == sorted(
        (r.setup, r.task, r.sample, r.prompt_tokens) for r in records(whole_config)
    )
    check_bytes(result)


def test_policies_may_see_the_question(config, monkeypatch):
    seen = []
    prefill = Engine.prefill
    monkeypatch.setattr(
        Engine, "prefill", lambda *a, **k: seen.append("query_ids" in k) or prefill(*a, **k)
    )
    setup = {"policy": "snapkv", "budget": "4x bytes", "protocol": "query_aware"}
    config = replace(config, tasks=("passkey",), setups=(setup,), batch_size=3)
    (_, cell) = json.loads(evaluate.run(config).read_text())["cells"]
    assert seen == [False, True]
    assert 0.85 * plain_units(4) < cell["units"]["max"] <= plain_units(4)


def test_shares_of_two_processes_make_the_whole(whole_config, whole, config):
    assert evaluate.run(config, ranks=Ranks(0, 2)) is None
    path = evaluate.run(config, ranks=Ranks(1, 2))
    told = [
        {(r.setup, r.task, r.sample): r.answer for r in records(of)}
        for of in (config, whole_config)
    ]
    assert told[0] == told[1] and len(told[0]) == 36
    assert json.loads(path.read_text())["cells"][0]["scores"] == whole["cells"][0]["scores"]


def test_a_task_without_a_length_has_a_share_of_each_context(config, tmp_path):
    data = write_data(tmp_path / "data")
    stories = [json.loads(line) for line in (data / DATA["fairytaleqa"]).open()]
    longer = [story | {"context": story["context"] * n} for n, story in enumerate(stories, 1)]
    (data / DATA["fairytaleqa"]).write_text("".join(json.dumps(row) + "\n" for row in longer))
    setup = {"policy": "knorm", "budget": "4x bytes"}
    config = replace(config, tasks=("fairytaleqa",), setups=(setup,), full=False, limit=4)
    config = replace(config, data_dir=str(data), data=DATA)
    for size in (1, 4):
        made = replace(config, output=f"{config.output}{size}", batch_size=size)
        evaluate.run(made)
        asked = records(made)
        units = [round(max(r.units)) for r in asked]
        assert units == [plain_units(4, tokens=r.compressed_tokens) for r in asked]
        assert len({*units}) == 4


def test_the_engine_is_told_in_the_manifest(whole):
    engines = whole["manifest"]["engines"]
    assert engines["knorm 8x bytes query_agnostic"]["budget"] == "8x bytes"


def test_bits_that_a_scheme_lacks_are_refused(config):
    setup = {"policy": "knorm", "budget": "8x bytes", "quantization": KIVI | {"bits": 3}}
    with pytest.raises(ValueError, match="setup knorm 8x bytes .*bits is 3"):
        evaluate.run(replace(config, setups=(setup,)))
