"""Grids at equal bytes: what is asked, in one process or several, and what is drawn."""

import dataclasses
import json

import pytest

from locret.cache.sizing import Sizing
from locret.cli import main
from locret.engine.engine import Engine
from locret.evaluation import byte_grid, byte_grid_figure
from locret.evaluation.byte_grid import ByteGridSettings, ByteRun
from locret.evaluation.needle import NeedleSettings
from locret.evaluation.ranks import Ranks
from locret.model.backbone import Backbone
from locret.model.loading import LoadedModel
from locret.quantization import NO_SCHEME
from tests.tiny_models import tiny_model

SETTINGS = ByteGridSettings(
    NeedleSettings(
        ("passkey", "niah_single"), tokens=400, count=3, ratios=(4, 8), chunk_size=64,
        local_tokens=20, max_new_tokens=2,
    ),
    bits=(16, 4),
    group=8,
)  # fmt: skip
POLICIES = ["full", "knorm"]
RUNS = [ByteRun("full", 1, bits) for bits in (16, 4)] + [
    ByteRun("knorm", ratio, bits) for ratio in (4, 8) for bits in (16, 4)
]


@pytest.fixture(scope="module")
def loaded(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer), head_dim=32).bfloat16()
    return LoadedModel(model, tokenizer, "tiny", None)


@pytest.fixture(scope="module")
def out(loaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid") / "new" / "grid.json"
    byte_grid.run_byte_grid(loaded, POLICIES, SETTINGS, out, manifest={"model": "tiny"})
    return out


def test_every_sample_is_asked_under_every_run(out):
    cells = json.loads(out.read_text())["results"]
    assert byte_grid.runs(POLICIES, SETTINGS) == RUNS
    asked = [(ByteRun(c["policy"], c["ratio"], c["bits"]), c["task"], c["seed"]) for c in cells]
    assert len(set(asked)) == len(asked) == len(RUNS) * 6
    assert asked[: len(RUNS)] == [(run, "passkey", SETTINGS.needle.seed) for run in RUNS]


def test_bytes_are_equal_and_units_are_not(out):
    for cell in json.loads(out.read_text())["results"]:
        if cell["policy"] == "knorm":
            allowed = Sizing(NO_SCHEME, 2, 2, 32).cache_bytes([400 // cell["ratio"]] * 2)
            assert 0.85 * allowed < cell["total_bytes"] <= allowed
            assert cell["units"] == [cell["budget"]] * 2
            assert (cell["budget"] > 400 // cell["ratio"]) == (cell["bits"] == 4)


def test_budgets_at_sixteen_bits_are_the_ratio(loaded):
    geometry = Backbone(loaded.model).geometry
    assert byte_grid.budget_of(ByteRun("knorm", 4, 16), SETTINGS, geometry) == 100
    assert byte_grid.budget_of(ByteRun("full", 1, 4), SETTINGS, geometry) == 400


def test_batches_ask_the_same_within_the_same_bytes(loaded, out, tmp_path):
    record = byte_grid.run_byte_grid(
        loaded, POLICIES, SETTINGS, tmp_path / "grid.json", manifest={"model": "tiny"}, batch_size=4
    )
    whole = json.loads(out.read_text())["results"]
    names = ("policy", "ratio", "bits", "task", "seed", "budget", "prompt_tokens")
    asked = sorted([c[n] for n in names] for c in record["results"])
    assert asked == sorted([c[n] for n in names] for c in whole)
    for cell in record["results"]:
        if cell["policy"] == "knorm":
            allowed = Sizing(NO_SCHEME, 2, 2, 32).cache_bytes([400 // cell["ratio"]] * 2)
            assert cell["total_bytes"] <= allowed


def test_policies_may_see_the_question(loaded, tmp_path, monkeypatch):
    asked = []
    prefill = Engine.prefill
    monkeypatch.setattr(
        Engine, "prefill", lambda *a, **k: asked.append(k["query_ids"]) or prefill(*a, **k)
    )
    settings = dataclasses.replace(SETTINGS, query_aware=True)
    out = tmp_path / "grid.json"
    cells = byte_grid.run_byte_grid(loaded, ["full", "snapkv"], settings, out, batch_size=6)
    assert [ids is None for ids in asked] == [True] * 2 + [False] * 4
    for cell in cells["results"]:
        if cell["policy"] == "snapkv":
            assert cell["units"] == [cell["budget"]] * 2


def test_a_stopped_run_goes_on_and_ends_the_same(loaded, out, tmp_path):
    whole = json.loads(out.read_text())["results"]
    part = tmp_path / "grid.json"
    settings = (loaded, POLICIES, SETTINGS, part)
    byte_grid.run_byte_grid(*settings, manifest={"model": "tiny"}, minutes=0)
    assert not part.exists()
    record = json.loads(out.read_text()) | {"results": whole[:10]}
    part.write_text(json.dumps(record))
    again = byte_grid.run_byte_grid(*settings, manifest={"model": "tiny"})["results"]
    assert again[:10] == whole[:10]
    assert [c["answer"] for c in again] == [c["answer"] for c in whole]
    with pytest.raises(ValueError, match="answers of other manifest"):
        byte_grid.run_byte_grid(*settings, manifest={"model": "other"})


def test_shares_make_the_whole(loaded, out, tmp_path):
    parts = [tmp_path / f"{rank}.json" for rank in range(2)]
    for rank, part in enumerate(parts):
        settings = {"manifest": {"model": "tiny"}, "ranks": Ranks(rank, 2)}
        byte_grid.run_byte_grid(loaded, POLICIES, SETTINGS, part, **settings)
    merged = byte_grid.merge(parts, tmp_path / "all.json")
    assert merged == json.loads((tmp_path / "all.json").read_text())
    whole = json.loads(out.read_text())["results"]
    answers = {tuple(c[n] for n in ("policy", "ratio", "bits", "task", "seed")): c["answer"]
               for c in whole}  # fmt: skip
    assert len(merged["results"]) == len(whole)
    for c in merged["results"]:
        key = tuple(c[n] for n in ("policy", "ratio", "bits", "task", "seed"))
        assert answers[key] == c["answer"]


def test_processes_keep_to_the_file_that_is_there(out, tmp_path, capsys):
    there = tmp_path / "grid.json"
    there.write_text(out.read_text())
    args = ["--policies", "full", "--json-out", str(there), "--processes", "2"]
    assert main(["grid", "--model", "tiny", *args]) == 2
    assert "holds answers of other settings" in capsys.readouterr().err
    assert there.read_text() == out.read_text()


def test_files_of_other_things_are_not_merged(out, tmp_path):
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match="no.json holds no byte grid"):
        byte_grid.merge([out, tmp_path / "no.json"], tmp_path / "all.json")
    assert not (tmp_path / "all.json").exists()


def test_table_and_figure(out, tmp_path):
    pytest.importorskip("matplotlib")
    record = json.loads(out.read_text())
    lines = byte_grid.as_table(record).partition("\n\n")[0].splitlines()
    assert len(lines) == 1 + len(RUNS)
    assert "all" in lines[1] and "full" in lines[1]
    assert byte_grid_figure.draw(record, tmp_path / "grid.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no results"):
        byte_grid_figure.figure({"results": []})


def test_a_table_of_a_model_in_float32_says_that_its_bytes_differ(out):
    record = json.loads(out.read_text())
    for dtype, said in (("float32", True), ("bfloat16", False)):
        table = byte_grid.as_table(record | {"manifest": {"dtype": dtype}})
        assert ("twice the bytes" in table) == said


def test_bits_that_a_scheme_lacks_are_refused():
    with pytest.raises(ValueError, match="bits is 3"):
        ByteGridSettings(NeedleSettings(), bits=(16, 3))


def test_the_command_merges_and_refuses(out, tmp_path, capsys):
    target = ["--json-out", str(tmp_path / "all.json")]
    args = ["grid", "--model", "tiny", "--policies", "full", *target]
    assert main([*args, "--merge", str(out)]) == 0
    assert "knorm" in capsys.readouterr().out
    assert main(["grid", "--model", "tiny", "--policies", "best", *target]) == 2
    assert "unknown" in capsys.readouterr().err
    assert main(["grid", "--model", "tiny", "--policies", "locret", *target]) == 2
    assert "--heads" in capsys.readouterr().err


def test_the_command_reads_prompts_at_once_or_in_chunks(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    for extra, chunk in (["--one-shot"], None), ([], 512):
        out = tmp_path / f"{chunk}.json"
        args = ["grid", "--model", str(tmp_path / "model"), "--device", "cpu", "--query-aware"]
        args += ["--policies", "snapkv", "--bits", "16", "--ratios", "4", "--tokens", "600"]
        args += ["--count", "1", "--max-new-tokens", "2", "--json-out", str(out), *extra]
        assert main(args) == 0
        record = json.loads(out.read_text())
        assert record["settings"]["needle"]["chunk_size"] == chunk
        assert len(record["results"]) == 1
