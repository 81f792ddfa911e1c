"""Samples whose needles no policy can evict: found by token positions, marked wherever shown."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from locret.evaluation import byte_grid, grid, heatmap, local_needles, needle, report_needle
from locret.evaluation.byte_grid import ByteGridSettings
from locret.evaluation.grid import GridSettings
from locret.evaluation.needle import NeedleSettings
from locret.evaluation.report import make_report
from locret.evaluation.report_blocks import Paragraph, Table
from locret.model.loading import LoadedModel
from locret.tasks.synthetic import make_sample
from tests.tiny_models import tiny_model

LOCAL = 150
SETTINGS = NeedleSettings(tokens=500, chunk_size=64, local_tokens=LOCAL, max_new_tokens=2)
GRID = GridSettings(lengths=(400, 900), depths=4, needle=SETTINGS)
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def loaded(tokenizer):
    return LoadedModel(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, "tiny", None)


@pytest.fixture(scope="module")
def record(loaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "grid.json"
    return grid.run_grid(loaded, ["full", "streaming_llm"], GRID, out)


def local(sample, tokenizer, tokens=LOCAL):
    settings = dataclasses.replace(SETTINGS, local_tokens=tokens)
    return needle.needle_is_local(sample, tokenizer, settings)


def compressed(sample, tokenizer, tokens=LOCAL):
    """The text that policies evict from."""
    ids = needle.needle_prompt(sample, tokenizer, True)[0]
    return tokenizer.decode(ids[: len(ids) - tokens])


@pytest.mark.parametrize("task", ["passkey", "niah_single", "niah_multivalue", "variable_tracking"])
def test_a_needle_is_local_if_the_compressed_text_lacks_a_part_of_it(task, tokenizer):
    seen = set()
    for place in range(10):
        for tokens in (20, 90, LOCAL, 260):
            sample = make_sample(task, 700, tokenizer, place, (place + 0.5) / 10, "noise")
            text = compressed(sample, tokenizer, tokens)
            # The last place of a string counts: it stands twice in some needles.
            whole = all(
                text.count(w) == needle.needle_text(sample, tokenizer, True).count(w)
                for w in sample.expected
            )
            assert local(sample, tokenizer, tokens) == (not whole)
            seen.add(whole)
    assert seen == {True, False}


def test_the_border_may_cut_a_needle(tokenizer):
    sample = make_sample("niah_single", 500, tokenizer, 3, 0.8, "noise")
    ids = needle.needle_prompt(sample, tokenizer, True)[0].tolist()
    (number,) = sample.expected
    holds = [n for n in range(len(ids)) if number in tokenizer.decode(ids[-n:])]
    cut = [n for n in range(1, len(ids)) if local(sample, tokenizer, n)]
    # From the number's last token on the needle is local, long before all of it is.
    assert cut == [*range(cut[0], len(ids))]
    assert cut[0] < min(n for n in holds if n) - 2
    assert local(sample, tokenizer, len(ids) + 9)


def test_what_is_asked_again_in_the_question_does_not_count(tokenizer):
    sample = make_sample("variable_tracking", 700, tokenizer, 1, 0.05, "noise")
    sample = dataclasses.replace(sample, expected=sample.expected[:1])
    again = dataclasses.replace(sample, question=f"{sample.question} {sample.expected[0]}?")
    assert not local(sample, tokenizer, 60) and not local(again, tokenizer, 60)


def test_tokenizers_without_offsets_are_counted(tokenizer):
    class InPython:
        is_fast = False

        def __call__(self, text, **kwargs):
            return {"input_ids": tokenizer(text, **kwargs)["input_ids"]}

    for place in range(8):
        sample = make_sample("niah_single", 500, tokenizer, place, (place + 0.5) / 8, "noise")
        text = needle.needle_text(sample, tokenizer, True)
        found = local_needles.is_local(sample, text, InPython(), LOCAL)
        assert found == local(sample, tokenizer)


def test_a_needle_that_is_not_in_the_prompt_is_not_local(tokenizer):
    sample = make_sample("niah_single", 500, tokenizer, 0, 0.5, "noise")
    text = needle.needle_text(sample, tokenizer, True)
    gone = dataclasses.replace(sample, expected=("nowhere",))
    assert not local_needles.is_local(gone, text, tokenizer, LOCAL)


def test_cells_of_a_grid_say_it(record):
    found = {(c["length"], c["row"]) for c in record["results"] if c["needle_is_local"]}
    assert (400, 3) in found and (900, 0) not in found and (400, 0) not in found
    assert found == grid.places_with_local_needles(record["results"])


def test_a_cell_without_an_answer_says_it_too(loaded, tmp_path, monkeypatch):
    def does_not_fit(*args):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(needle, "ask", does_not_fit)
    made = grid.run_grid(loaded, ["full"], GRID, tmp_path / "grid.json")["results"]
    assert {c["needle_is_local"] for c in made} == {True, False}


def test_the_table_of_a_grid_marks_lengths_and_counts_samples(record):
    only = grid.places_with_local_needles(record["results"])
    table = grid.as_table(record)
    lines = table.splitlines()
    marked = [value.endswith("*") for value in lines[1].split()[2:]]
    assert marked == [any(n == of for of, _ in only) for n in (400, 900)]
    words = " ".join(table.split())
    assert f"* {len(only)} of 8 samples" in words and f"last {LOCAL} tokens" in words
    assert "says nothing about the policy" in words


def test_the_heat_map_marks_cells(record):
    pytest.importorskip("matplotlib")
    made = heatmap.figure(record)
    places = grid.places_with_local_needles(record["results"])
    for axis in made.axes[:2]:
        marks = {(round(t.get_position()[0]), round(t.get_position()[1])) for t in axis.texts}
        assert marks == {(GRID.lengths.index(length), row) for length, row in places}
        assert all(t.get_text() == "*" for t in axis.texts)
    assert "says nothing" in " ".join(made.get_supxlabel().split())


def test_a_report_marks_them_and_says_how_many(record, tmp_path):
    pytest.importorskip("matplotlib")
    blocks = list(report_needle.grid_blocks(record))
    (table, sizes) = [block for block in blocks if isinstance(block, Table)]
    assert table.rows[0][2].endswith("*")
    assert sizes.rows[0][:2] == ["streaming_llm", "8x"] and sizes.rows[0][2].endswith("x")
    said = [block.text for block in blocks if isinstance(block, Paragraph)]
    assert any("of 8 samples" in text and text.startswith("*") for text in said)
    (tmp_path / "grid.json").write_text(json.dumps(record))
    make_report([tmp_path / "grid.json"], tmp_path / "out")
    assert "says nothing about the policy" in (tmp_path / "out" / "report.md").read_text()


def test_the_report_of_a_run_marks_them(loaded):
    settings = dataclasses.replace(SETTINGS, count=4)
    results = list(needle.run_needles(loaded, ["full", "random"], settings))
    result = json.loads(json.dumps(needle.as_json(settings, results)))
    blocks = list(report_needle.run_blocks(result))
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert table.header[:4] == ["policy", "asked", "real", "found"]
    assert [row[3][-1] for row in table.rows] == ["*", "*"]
    count = sum(one.needle_is_local for one in results) // 2
    assert 0 < count < 4
    assert any(f"* {count} of 4 samples" in b.text for b in blocks if isinstance(b, Paragraph))
    for row in result["summary"]:  # as runs wrote it before
        for name in ("local", "context_units", "context_tokens"):
            del row[name]
    for row in result["results"]:
        del row["needle_is_local"]
    text = " ".join(b.text for b in report_needle.run_blocks(result) if isinstance(b, Paragraph))
    assert "Of 4 of 4 samples it is not recorded" in text


def test_a_grid_at_equal_bytes_marks_them(loaded, tmp_path):
    settings = ByteGridSettings(dataclasses.replace(SETTINGS, count=4, ratios=(4,)), bits=(16,))
    out = tmp_path / "grid.json"
    made = byte_grid.run_byte_grid(loaded, ["full", "knorm"], settings, out)
    count = sum(cell["needle_is_local"] for cell in made["results"]) // 2
    assert 0 < count < 4
    table = byte_grid.as_table(made)
    assert [line.split()[-1][-1] for line in table.splitlines()[1:3]] == ["*", "*"]
    assert f"* {count} of 4 samples" in " ".join(table.split())


def test_committed_results_can_still_be_shown():
    for path in ("needle_1k_32k.json", "byte_grid_4k.json"):
        made = json.loads((RESULTS / path).read_text())
        of = grid if made["kind"] == grid.KIND else byte_grid
        table = of.as_table(made).partition("\n\n")[0]
        unknown = not any("needle_is_local" in cell for cell in made["results"])
        assert not unknown or ("*" not in table and "not recorded" in of.as_table(made))
