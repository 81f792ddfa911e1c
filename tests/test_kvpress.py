"""One-shot policies keep the units that kvpress keeps (`benchmarks/kvpress_positions.py`)."""

import json
from pathlib import Path

import pytest

from benchmarks import kvpress_positions as comparison

RECORDED = Path(__file__).parent.parent / "docs" / "results" / "kvpress_positions.json"


@pytest.mark.parametrize("name", comparison.MODELS)
def test_the_recorded_run_kept_the_same_units_in_every_head(name):
    """Of the environment that kvpress needs; see the benchmark's head."""
    record = json.loads(RECORDED.read_text())
    assert record["figures"]["kvpress_versions"]["kvpress"].startswith("0.5.")
    assert set(record["figures"][name]) == set(comparison.NAMES)
    for policy, result in record["figures"][name].items():
        assert result["same"], policy


@pytest.mark.parametrize("name", comparison.MODELS)
def test_kept_units_are_those_of_kvpress(name, tmp_path):
    try:
        import kvpress  # noqa: F401
    except ImportError as reason:
        pytest.skip(f"kvpress cannot be imported beside this transformers: {reason}")
    comparison.make_model(comparison.MODELS[name], tmp_path)
    theirs = comparison.kept_by_kvpress(tmp_path)
    ours = comparison.kept_by_locret(tmp_path, theirs)
    for policy in comparison.NAMES:
        assert comparison.compare(ours[policy], theirs[policy])["same"], policy
