"""The long-context benchmark: what it measures, writes and survives, on the tiny shape."""

import importlib.util
import json
import sys

import pytest
import torch

from benchmarks import longcontext, systems
from benchmarks.answer_clock import AnswerClock, OutOfTime
from benchmarks.shapes import random_model
from locret.model.weights import FP8_CAPABILITY

SMALL = {
    "shape": "tiny",
    "length": 96,
    "budget": 32,
    "chunk-size": 16,
    "heads-width": 8,
    "new-tokens": 4,
    "repeats": 1,
    "device": "cpu",
    "engine": "local_tokens=4",
}
needs_kvpress = pytest.mark.skipif(
    importlib.util.find_spec("kvpress") is None, reason="package kvpress is not installed"
)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the benchmark; returns its results."""
    machine = longcontext.floors.Machine(flops=1e12, bandwidth=1e11)
    monkeypatch.setattr(longcontext.floors, "measure", lambda *_: machine)

    def run(**given):
        out = tmp_path / "r.json"
        given = {name.replace("_", "-"): value for name, value in given.items()}
        settings = SMALL | {"out": out} | given
        longcontext.main([f"--{name}={value}" for name, value in settings.items()])
        return json.loads(out.read_text())["figures"]["results"]

    return run


def test_every_figure_of_a_system_is_there_and_consistent(bench):
    full, ours = bench(systems="full,locret")
    assert (full["units"], ours["units"]) == (99, 39)  # the last token is not read
    for row in (full, ours):
        times = row["runs"][0]["token_seconds"]
        assert row["status"] == "ok"
        assert len(times) == 4 and times == sorted(times)
        assert row["first_token_seconds"] == times[0]
        assert row["prefill_tokens_per_second"] == pytest.approx(96 / times[0])
        assert row["decode_tokens_per_second"] == pytest.approx(3 / (times[3] - times[0]))
        assert row["prefill_over_floor"] > 1 and row["step_over_floor"] > 1
        assert row["peak_gib"] is None
    assert ours["prefill_speed_up"] == full["first_token_seconds"] / ours["first_token_seconds"]
    assert ours["prefill_floor_seconds"] < full["prefill_floor_seconds"]
    assert full["prefill_speed_up"] == full["decode_speed_up"] == 1


def test_a_full_that_comes_last_still_gives_the_others_their_ratios(bench, capsys):
    ours, _ = bench(systems="locret,full")
    assert ours["prefill_speed_up"] > 0
    first, again = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("locret")
    ]
    assert first.count(" - ") > again.count(" - ")


def test_lists_of_lengths_and_rows_are_compared_and_drawn(bench, tmp_path, capsys):
    picture = tmp_path / "plots" / "r.png"
    rows = bench(length="64,96", batch="1,2", systems="locret", policy="random", plot=picture)
    assert [(r["length"], r["batch"]) for r in rows] == [(64, 1), (64, 2), (96, 1), (96, 2)]
    said = capsys.readouterr().out
    assert "locret, batch 1: length 64 -> 96, time per prompt token x" in said
    assert "locret, length 96: batch 1 -> 2, time per prompt token x" in said
    assert picture.stat().st_size > 0


def stand_in(error):
    def system(model, setting):
        def answer(ids, clock):
            raise error

        return answer

    return system


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.91 GiB. GPU 0 has"),
            "out of memory",
            "wanted 3.91 GiB more",
        ),
        (OutOfTime("the time given is over"), "out of time", "the time given is over"),
        (RuntimeError("broken"), "failed", "RuntimeError: broken"),
    ],
)
def test_a_system_that_fails_is_recorded_and_the_others_run(
    bench, monkeypatch, capsys, error, status, said
):
    monkeypatch.setitem(systems.SYSTEMS, "kvpress", stand_in(error))
    monkeypatch.setattr(systems, "snapkv_press", lambda: None)
    failed, full = bench(systems="kvpress,full")
    assert (failed["status"], full["status"]) == (status, "ok")
    assert said in capsys.readouterr().out


def test_when_the_time_is_over_the_rest_is_not_run(bench):
    rows = bench(systems="full,locret", max_time=1e-9)
    assert {row["status"] for row in rows} == {"not run: out of time"}


def test_a_clock_past_its_deadline_stops_reading_and_decoding():
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    late = AnswerClock(model.device, deadline=0.0)
    late.start()
    for name in ("full", "locret"):
        setting = systems.Setting(budget=32, policy="random", engine={"local_tokens": 4})
        with pytest.raises(OutOfTime):
            systems.SYSTEMS[name](model, setting)(torch.ones(1, 60, dtype=torch.long), late)


@needs_kvpress
@pytest.mark.parametrize("shape", ["tiny", "qwen3-4b", "phi-3-mini"])
def test_kvpress_keeps_the_budget_and_patches_nothing(shape):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    small = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    if shape == "phi-3-mini":
        small["hidden_size"] = 192  # its factors are for heads of 96
    before = dict(ALL_ATTENTION_FUNCTIONS.items()), {m for m in sys.modules if "kvpress" in m}
    model = random_model(shape, torch.device("cpu"), torch.float32, **small)
    clock = AnswerClock(model.device)
    clock.start()
    answer = systems.kvpress(model, systems.Setting(budget=70, new_tokens=5))
    cache = answer(torch.randint(0, 64, (2, 201)), clock)
    assert systems.held(cache)["units"] == 74
    assert len(clock.times) == 5
    after = dict(ALL_ATTENTION_FUNCTIONS.items()), {m for m in sys.modules if "kvpress" in m}
    assert after == before
    assert not any(module._forward_hooks for module in model.modules())


@needs_kvpress
def test_kvpress_within_its_budget_answers_as_full_does():
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    ids = torch.randint(0, 256, (1, 90))
    said = {}
    for name in ("full", "kvpress"):
        seen = []
        clock = AnswerClock(model.device)
        clock.start()
        clock.put = lambda value, seen=seen: seen.extend(value.flatten().tolist())
        systems.SYSTEMS[name](model, systems.Setting(budget=100, new_tokens=6))(ids, clock)
        said[name] = seen[-6:]
    assert said["full"] == said["kvpress"]


def test_a_missing_kvpress_is_told_before_anything_runs(bench, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'locret\[bench\]'"):
        bench(systems="kvpress")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"systems": "full,other"}, "other: expected some of full, kvpress, locret"),
        ({"length": "0"}, "expected numbers above zero"),
        ({"engine": "stabilizers"}, "expected NAME=VALUE"),
        ({"shape": "gpt-9"}, "invalid choice"),
    ],
)
def test_wrong_arguments_are_refused(bench, capsys, args, message):
    with pytest.raises(SystemExit):
        bench(**args)
    assert message in capsys.readouterr().err


def test_engine_arguments_are_read_as_what_they_are():
    read = [
        longcontext._engine_argument(f"x={text}")[1] for text in ("none", "False", "-3", "sdpa")
    ]
    assert read == [None, False, -3, "sdpa"]


@pytest.mark.gpu
def test_peak_memory_is_seen_within_a_limit(bench):
    try:
        rows = bench(device="cuda", systems="full,locret", memory_limit_gib=4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(0 < row["peak_gib"] < 4 for row in rows)


def test_weights_in_fewer_bits(bench, tmp_path):
    pytest.importorskip("torchao", reason="package torchao is not installed")
    (row,) = bench(systems="locret", weights="int8")
    assert row["status"] == "ok"
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["weights"] == "int8"


@pytest.mark.gpu
def test_weights_in_fp8_on_a_gpu(bench):
    pytest.importorskip("torchao", reason="package torchao is not installed")
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip(f"needs a GPU of compute capability {FP8_CAPABILITY} or above")
    (row,) = bench(systems="locret", weights="fp8", device="cuda", new_tokens=16)
    assert row["status"] == "ok" and row["peak_gib"] > 0
