"""The benchmark of unequal heads: its tables of quotas, and what it measures on the tiny shape."""

import json
from itertools import pairwise

import pytest

from benchmarks import ragged
from benchmarks.shapes import SHAPES
from locret.heads.quotas import spread

SMALL = {
    "shape": "tiny",
    "length": 200,
    "budget": 40,
    "chunk-size": 32,
    "heads-width": 8,
    "new-tokens": 4,
    "local-tokens": 4,
    "repeats": 1,
    "device": "cpu",
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the benchmark; returns its figures."""
    machine = ragged.floors.Machine(flops=1e12, bandwidth=1e11)
    monkeypatch.setattr(ragged.floors, "measure", lambda *_: machine)

    def run(**given):
        out = tmp_path / "r.json"
        given = {name.replace("_", "-"): value for name, value in given.items()}
        settings = SMALL | {"out": out} | given
        ragged.main([f"--{name}={value}" for name, value in settings.items()])
        return json.loads(out.read_text())["figures"]

    return run


def test_a_tenth_of_the_heads_holds_half_and_shares_fall_from_40_to_1_per_cent():
    table = ragged.falling(32, 8, ragged.FALL_OF_LAYERS)
    assert 0.48 < spread(table)["top_tenth"] < 0.54
    for place, layer in enumerate(table):
        shares = sorted((quota / sum(layer) for quota in layer), reverse=True)
        assert shares[0] == pytest.approx(0.40, abs=0.01)
        assert shares[-1] == pytest.approx(0.0125, abs=0.001)
        assert layer[place % 8] == max(layer)
    sums = [sum(layer) for layer in table]
    assert max(sums) / min(sums) == pytest.approx(1 / ragged.FALL_OF_LAYERS)
    assert all(max(a, b) / min(a, b) > 1.5 for a, b in pairwise(sums))
    alike = [sum(layer) for layer in ragged.falling(32, 8)]
    assert alike == pytest.approx([alike[0]] * 32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [ragged.falling, ragged.one_head])
def test_every_head_of_every_shape_has_a_quota(make, shape):
    layers = SHAPES[shape]["num_hidden_layers"]
    heads = SHAPES[shape]["num_key_value_heads"]
    table = make(layers, heads)
    assert len(table) == layers and {len(layer) for layer in table} == {heads}
    assert min(quota for layer in table for quota in layer) > 0


def test_one_head_has_83_per_cent_of_its_layer():
    for place, layer in enumerate(ragged.one_head(4, 8)):
        assert sum(layer) == pytest.approx(1)
        assert layer[place % 8] == 0.83 == max(layer)


def test_every_row_is_measured_and_compared_with_equal_heads(bench, capsys):
    figures = bench()
    rows = {row["row"]: row for row in figures["results"]}
    assert list(rows) == list(ragged.ROWS)
    for name, row in rows.items():
        assert row["status"] == "ok"
        assert row["prefill_seconds"] > row["prefill_floor_seconds"] > 0
        assert row["decode_tokens_per_second"] > 0 and row["peak_gib"] is None
        steps = {"taken": 11, "fast": 0, "replayed": 0, "fused": 0, "ahead": 0}
        assert row["steps"] == steps  # no graph on a CPU
        assert row["prefill_of_equal"] > 0 and row["decode_of_equal"] > 0
        tail = 4 + 4 + ragged.WARM_STEPS - 1  # the last token is not read
        assert row["units"] == 40 * ragged.ROWS[name].times + tail
    assert rows["equal"]["most_units"] == rows["equal"]["least_units"]
    assert rows["unequal"]["most_units"] > rows["unequal"]["least_units"]
    assert rows["layers"]["most_units"] > 2 * rows["layers"]["least_units"]
    assert rows["one-head"]["kv_bytes"] == rows["equal"]["kv_bytes"]
    assert rows["rotated"]["kv_bytes"] < rows["wide"]["kv_bytes"] / 1.5
    assert rows["wide"]["prefill_floor_seconds"] > rows["equal"]["prefill_floor_seconds"]
    assert set(figures["quotas"]) == {"unequal", "layers", "one-head"}
    said = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("0/11") for line in said) == len(rows)


def test_a_row_runs_alone_in_chunks_of_several_sizes(bench):
    rows = bench(rows="unequal", chunk_size="32,64")["results"]
    assert [(row["row"], row["chunk_size"]) for row in rows] == [("unequal", 32), ("unequal", 64)]
    assert all(row["status"] == "ok" and "prefill_of_equal" not in row for row in rows)


def test_a_policy_without_heads_scores(bench):
    (row,) = bench(rows="equal", policy="streaming_llm")["results"]
    assert row["status"] == "ok"


def test_when_the_time_is_over_the_rest_is_not_run(bench, capsys):
    rows = bench(rows="equal,wide", max_time=1e-9)["results"]
    assert {row["status"] for row in rows} == {"not run: out of time"}
    assert "not run: out of time" in capsys.readouterr().out


def test_a_row_that_fails_is_recorded_and_the_others_run(bench, monkeypatch):
    monkeypatch.setitem(ragged.ROWS, "wide", ragged.Kind(quantization="none", times=0))
    failed, equal = bench(rows="wide,equal")["results"]
    assert (failed["status"], equal["status"]) == ("failed", "ok")
    assert "budget is 0" in failed["error"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"rows": "equal,other"}, "other: expected some of equal, unequal"),
        ({"chunk-size": "0"}, "expected numbers above zero"),
    ],
)
def test_wrong_arguments_are_refused(bench, capsys, args, message):
    with pytest.raises(SystemExit):
        bench(**args)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_steps_are_replayed_on_a_gpu(bench):
    for row in bench(device="cuda", rows="equal,unequal")["results"]:
        assert row["status"] == "ok" and row["steps"]["replayed"] >= 8 and row["peak_gib"] > 0
