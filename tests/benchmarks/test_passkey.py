"""The pass-key benchmark runs end to end on a tiny random model, which finds nothing."""

import json

import pytest

from benchmarks import passkey
from tests.tiny_models import tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passkey")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    tiny_heads(model).save_pretrained(folder / "heads")
    return folder


def run(folder, out, *more):
    passkey.main(
        [
            *("--model", str(folder / "backbone"), "--adapter", "", "--device", "cpu"),
            *("--heads", str(folder / "heads"), "--tokens", "1500", "--budget", "64"),
            *("--chunk-size", "32", "--max-new-tokens", "4", "--out", str(out), *more),
        ]
    )
    return json.loads(out.read_text())["figures"]


def test_every_depth_is_asked_beyond_the_window_within_the_budget(folder, tmp_path, capsys):
    figures = run(folder, tmp_path / "r.json", "--depths", "0.1,0.9")
    assert [row["depth"] for row in figures["results"]] == [0.1, 0.9]
    for row in figures["results"]:
        assert row["prompt_tokens"] > 4 * figures["window"]
        assert row["units"] == 64 + figures["local_tokens"] + 3
        assert row["found"] is False and len(row["expected"]) == 1
        assert len(row["token_seconds"]) == 4
    assert "found 0 of 2" in capsys.readouterr().out


def test_when_the_time_is_over_it_says_so(folder, tmp_path):
    figures = run(folder, tmp_path / "r.json", "--depths", "0.5", "--max-time", "1e-9")
    assert figures["results"] == [{"depth": 0.5, "status": "out of time"}]
