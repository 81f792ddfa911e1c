"""One-shot policies keep the units that kvpress keeps (`benchmarks/kvpress_positions.py`), and a
real model answers alike (`benchmarks/kvpress_answers.py`)."""

import json
from pathlib import Path

import pytest

from benchmarks import kvpress_answers
from benchmarks import kvpress_positions as comparison
from locret.model.hooks import as_before

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RECORDED = RESULTS / "kvpress_positions.json"


@pytest.mark.parametrize("name", comparison.MODELS)
def test_the_recorded_run_kept_the_same_units_in_every_head(name):
    """Of the environment that kvpress needs; see the benchmark's head."""
    record = json.loads(RECORDED.read_text())
    assert record["figures"]["kvpress_versions"]["kvpress"].startswith("0.5.")
    assert set(record["figures"][name]) == set(comparison.NAMES)
    for policy, result in record["figures"][name].items():
        assert result["same"], policy


@pytest.mark.parametrize("name", comparison.MODELS)
def test_kept_units_are_those_of_kvpress(name, tmp_path, monkeypatch):
    """Its presses were written for an older transformers; given what that would say, they run."""
    pytest.importorskip("kvpress")  # which Python 3.13 cannot import: a library of its own cannot
    from kvpress.presses.base_press import BasePress as base

    hook = base.forward_hook
    monkeypatch.setattr(
        base,
        "forward_hook",
        lambda press, layer, args, kwargs, output: hook(
            press, layer, args, as_before(layer, kwargs), output
        ),
    )
    comparison.make_model(comparison.MODELS[name], tmp_path)
    theirs = comparison.kept_by_kvpress(tmp_path)
    ours = comparison.kept_by_locret(tmp_path, theirs)
    for policy in comparison.NAMES:
        assert comparison.compare(ours[policy], theirs[policy])["same"], policy


def test_the_recorded_answers_are_those_of_kvpress():
    figures = json.loads((RESULTS / "kvpress_answers.json").read_text())["figures"]
    for policy in kvpress_answers.NAMES:
        for protocol in kvpress_answers.PROTOCOLS:
            found = figures[f"{policy} {protocol}"]
            assert found["alike"] == found["count"] >= 10, (policy, protocol)


def test_answers_are_compared():
    ours, theirs = [{"answer": "1"}, {"answer": "2"}], [{"answer": "1"}, {"answer": "3"}]
    theirs[0]["units"] = [4]
    found = kvpress_answers.compare(ours, theirs, ["1", "3"])
    assert (found["count"], found["alike"], found["right"], found["units"]) == (2, 1, 1, [4])
