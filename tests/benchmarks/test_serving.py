"""The benchmark of serving runs end to end on a tiny random model, and ends its servers."""

import json
import time

import pytest

from benchmarks import serving
from benchmarks.servers import Failed, running
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

ENGINE = "--policy keydiff --budget 64 --chunk-size 128 --device cpu --dtype float32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def run(folder, out, *more):
    serving.main(
        [
            *("--model", str(folder), "--serve", ENGINE, "--contexts", "3", "--tokens", "1024"),
            *("--new-tokens", "8", "--alone", "2", "--max-time", "120", "--out", str(out), *more),
        ]
    )
    return json.loads(out.read_text())["figures"]["results"]


def test_all_contexts_are_answered_together_as_alone(folder, tmp_path, capsys):
    (row,) = run(folder, tmp_path / "r.json", "--systems", "locret", "--rounds", "1")
    assert (row["status"], row["done"], row["alike"], row["asked_alone"]) == ("ok", 3, 2, 2)
    assert row["found"] == 0 and row["errors"] == [] and row["stored_gib"] > 0
    assert [each["units"] for each in row["reading"]] == [64] * 3
    assert all(each["completion_tokens"] <= 8 for each in row["rounds"][0]["answers"])
    assert row["speed_up"] == row["all_per_second"] / row["one_per_second"]
    assert "locret: asked all, 1 of 1 times" in capsys.readouterr().out


def test_a_server_that_does_not_start_says_why_and_is_gone(tmp_path):
    with (
        pytest.raises(Failed, match="did not start; exit status 2.*unrecognized arguments: --port"),
        running("http.server", [], tmp_path, 1.0, time.monotonic() + 60) as server,
    ):
        server.wait("/")
    assert server.process.returncode == 2


def test_what_the_cache_of_transformers_holds_is_read_from_its_log():
    log = "INFO: self.max_batch_tokens = 8192, self.num_blocks = 100, self.block_size = 256\nMore"
    assert serving.room(log, 1000) == {"room_tokens": 25600, "room": 25}
    assert serving.room("no such line", 1000) == {}
