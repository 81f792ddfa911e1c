"""The loss of right answers under setups of an evaluation."""

import json

import pytest
import yaml

from benchmarks.answer_loss import main
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answer_loss")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    values = {
        "model": str(folder / "model"),
        "output": str(folder / "unused"),
        "chat_template": False,
        "tasks": ["niah_single", "niah_multikey"],
        "lengths": [600],
        "limit": 2,
        "depths": 2,
        "engine": {"chunk_size": 64},
        "setups": [
            {"policy": "full", "name": "whole", "engine": {"chunk_size": None}},
            {"policy": "streaming_llm", "name": "short", "budget": 0.1},
            {"policy": "snapkv", "budget": 0.5, "protocol": "query_aware"},
        ],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    out = folder / "r.json"
    main(["--config", str(folder / "config.yaml"), "--out", str(out), "--values", "seed=3"])
    assert not (folder / "unused").exists()
    return json.loads(out.read_text())


def test_every_question_meets_every_setup(told):
    rows = told["figures"]["rows"]
    assert len(rows) == 2 * 2 * 4
    assert {row["task"] for row in rows} == {"niah_single@600", "niah_multikey@600"}
    assert all(row["loss"] > 0 and row["tokens"] > 0 for row in rows)
    assert told["settings"]["evaluation"]["seed"] == 3


@pytest.mark.parametrize("task", ["niah_single@600", "niah_multikey@600"])
def test_figures_are_beside_the_full_cache(told, task):
    figures = {of["setup"].split()[0]: of for of in told["figures"]["tasks"] if of["task"] == task}
    assert {of["count"] for of in figures.values()} == {2}
    assert "over_full" not in figures["full"]
    assert figures["whole"]["over_full"] == pytest.approx(0, abs=1e-4)
    assert figures["short"]["over_full"] != 0
    rows = [row for row in told["figures"]["rows"] if row["task"] == task]
    losses = [row["loss"] for row in rows if row["setup"] == "full"]
    assert figures["full"]["loss"] == pytest.approx(sum(losses) / 2)
