"""The benchmark of training runs end to end on a tiny random model."""

import json
import sys

import pytest

from benchmarks import training
from datamodules.encoder import LEAD_TOKENS

TINY = ["--shape", "tiny", "--width", "8", "--device", "cpu", "--repeats", "1"]


@pytest.mark.parametrize(
    "sample",
    [
        ["--prompt", "40", "--answer", "8"],
        ["--prompt", "50", "--replay", "20", "--label", "log_max_prob"],
        ["--prompt", "50", "--replay", "20", "--chunk-size", "16"],
    ],
)
def test_a_run(tmp_path, monkeypatch, sample):
    out = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["training", *TINY, *sample, "--out", str(out)])
    training.main()
    figures = json.loads(out.read_text())["figures"]
    assert figures["step_seconds"] > 0 and figures["forward_seconds"] > 0


def test_a_replayed_prompt_is_said_again_whole(monkeypatch):
    given = training._parser().parse_args(["--prompt", "50", "--replay", "20", "--out", "r.json"])
    segment = training._segment(given)
    said = [end - start for start, end in segment.answers]
    assert said == [20, 20, 10] and segment.branches[0][0] == 50
    led_in = [a[0] - b[0] for a, b in zip(segment.answers, segment.branches, strict=True)]
    assert led_in == [0, LEAD_TOKENS, LEAD_TOKENS]
