"""Reports: every kind of result becomes tables and figures; anything else is refused by name."""

import base64
import json
import re
from pathlib import Path

import pytest

from locret.cli import main
from locret.evaluation import tables
from locret.evaluation.config import Setup
from locret.evaluation.report import make_report
from locret.evaluation.tables import HEADER, Table, html_of, markdown_of
from tests.evaluation.result_data import asked, result_of

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG"


def held(mean):
    return {"mean": mean, "max": mean}


def setup(name, score, units, budget="8x", protocol="query_agnostic", quantization=None, size=None):
    """A setup over two tasks, as `locret evaluate` writes it."""
    label = name if name == "full" else f"{name} {budget} {protocol} {quantization}"
    found = {
        "setup": label, "policy": name, "name": name, "quantization": quantization,
        "budget": None if name == "full" else budget,
        "protocol": "any" if name == "full" else protocol,
        "score": score, "interval": [score - 0.1, score + 0.05],
        "units": held(units), "bytes": held(size or units * 1024), "tasks": 2, "count": 20,
        "full_cache_bytes": held(4096 * 1024), "cut": 0, "answer_cut": 0, "failed": 0,
        "seconds": 1.0,
    }  # fmt: skip
    if name != "full":
        found |= {"difference": score - 0.8, "difference_interval": [-0.3, 0.02]}
    return found


def evaluation(*setups, cut=0):
    """A result of `locret evaluate`."""
    keys = ("setup", "score", "interval")
    cells = [
        {"task": task, "metric": "f1", "count": 10, "cut": cut, "answer_cut": cut // 2,
         "failed": 0, "length": None}
        | {key: of[key] for key in keys}
        for of in setups
        for task in ("qa", "summary")
    ]  # fmt: skip
    facts = [{"hardware": {"device": "cuda", "accelerator": "NVIDIA H200"}, "commit": "abc"}]
    config = {"model": "embedded:smollm2", "adapter": "an/adapter", "heads": None}
    return {
        "kind": "evaluation", "format": 2, "name": "long questions",
        "manifest": {"config": config, "computed": facts}, "setups": list(setups), "cells": cells,
    }  # fmt: skip


FULL = setup("full", 0.8, 4096)


def needle_map():
    """Needles at two lengths and depths; the full cache does not fit at the longer one."""
    full, locret, random = Setup("full"), Setup("locret", "8x"), Setup("random", "8x")
    return result_of(
        *(asked(full, [found] * 2, length=n) for n, found in ((1024, True), (2048, None))),
        *(asked(locret, [True] * 2, length=n) for n in (1024, 2048)),
        *(asked(random, [False] * 2, length=n) for n in (1024, 2048)),
    )


def at_equal_bytes(*policies):
    """Needles in 16 and in 4 bits: two of three of each task found."""
    setups = [
        Setup(policy, None if policy == "full" else "8x bytes", quantization=stored)
        for policy in policies
        for stored in (None, {"name": "kivi", "bits": 4})
    ]
    return result_of(
        *(
            asked(setup, [True, True, False], task, bytes=3 * 2**19, units=units)
            for setup in setups
            for task in ("niah_single", "passkey")
            for units in [(100.0, 100) if setup.quantization is None else (400.0, 400)]
        )
    )


def benchmark(*systems):
    results = [
        {"system": name, "length": length, "batch": 1, "status": status, "units": 16384,
         "first_token_seconds": 2.0, "prefill_tokens_per_second": 65536.0, "peak_gib": 22.5,
         "decode_tokens_per_second": 40.0, "prefill_speed_up": 1.5}
        for name, status in systems
        for length in (65536, 131072)
    ]  # fmt: skip
    return {
        "settings": {"shape": "llama-3.1-8b", "repeats": 2}, "figures": {"results": results},
        "hardware": "1 x NVIDIA H200", "versions": {"torch": "2.11"}, "commit": None, "date": "",
    }  # fmt: skip


@pytest.fixture
def report(tmp_path):
    """Make a report of the given results; returns its Markdown."""

    def make(*results):
        paths = []
        for number, result in enumerate(results):
            paths.append(tmp_path / f"result{number}.json")
            paths[-1].write_text(json.dumps(result))
        make_report(paths, tmp_path / "out")
        return (tmp_path / "out" / "report.md").read_text()

    return make


def table_rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def figures(folder):
    return sorted(path.name for path in (folder / "out" / "figures").glob("*.png"))


def test_an_evaluation_has_the_full_cache_first_protocols_and_intervals(report, tmp_path):
    aware = setup("locret", 0.75, 512, protocol="query_aware")
    text = report(evaluation(setup("locret", 0.7, 512), aware, FULL))
    assert "### long questions" in text
    assert "embedded:smollm2" in text and "NVIDIA H200" in text and "an/adapter" in text
    rows = table_rows(text)
    assert [r[0] for r in rows[1:4]] == ["full", "locret", "locret"]
    assert rows[1][2:5] == ["all", "any", "80.0 (70.0-85.0)"]
    assert rows[2][2:] == [
        "8x", "query-agnostic", "70.0 (60.0-75.0)", "-10.0 (-30.0 to +2.0)", "512", "0.5", "0.125"
    ]  # fmt: skip
    assert rows[3][3] == "query-aware"
    assert rows[4][:4] == ["task", "metric", "n", "full"]
    assert rows[5][:4] == ["qa", "f1", "10", "80.0 (70.0-85.0)"]
    assert "cut" not in text
    assert figures(tmp_path) == ["00-result0-budget.png"]


def test_shares_of_the_full_cache_and_other_scores_have_their_places(report):
    half = setup("locret", 0.4, 512) | {"share": 0.5, "share_interval": [0.4, 0.625]}
    result = evaluation(FULL, half)
    for cell in result["cells"]:
        if cell["task"] == "qa":
            other = {"score": 0.25, "interval": [0.2, 0.3]}
            against = {"share": 0.75, "share_interval": [0.7, 0.8]}
            against = {} if cell["setup"] == "full" else against
            cell["others"] = {"exact_match": other | against}
    rows = table_rows(report(result))
    assert rows[0] == [*HEADER[:6], "share of full", *HEADER[6:]]
    assert [row[6] for row in rows[1:3]] == ["-", "50.0 (40.0-62.5)"]
    assert [row[:2] for row in rows[3:7]] == [
        ["task", "metric"], ["qa", "f1"], ["qa", "exact_match"], ["summary", "f1"]
    ]  # fmt: skip
    assert rows[5][3:] == ["25.0 (20.0-30.0)"] * 2
    shares = rows[7:]
    assert [row[0] for row in shares] == ["task", "qa", "qa", "summary"]
    assert shares[2][3:] == ["-", "75.0 (70.0-80.0)"]
    table = tables.as_markdown(result).splitlines()
    assert table[0].split(" | ")[-4:] == ["MiB", "qa", "qa exact_match", "summary |"]
    assert "| 50.0 (40.0-62.5) |" in table[3] and "| 40.0 | 25.0 | 40.0 |" in table[3]


def test_the_committed_tables_are_drawn_again_as_they_are():
    results = sorted((ROOT / "docs" / "results").glob("*.json"))
    drawn = [path for path in results if path.with_suffix(".md").is_file()]
    assert drawn
    for path in drawn:
        assert (
            tables.as_markdown(json.loads(path.read_text())) == path.with_suffix(".md").read_text()
        )


def test_quantized_setups_are_drawn_against_bytes(report, tmp_path):
    quantized = setup("locret", 0.7, 2048, quantization="kivi-4", size=512 * 1024)
    text = report(evaluation(FULL, setup("locret", 0.6, 512), quantized))
    assert [r[1] for r in table_rows(text)[1:4]] == ["not quantized", "not quantized", "kivi-4"]
    assert figures(tmp_path) == ["00-result0-budget.png", "00-result0-bytes.png"]


def test_what_is_missing_or_cut_is_said(report):
    text = report(evaluation(setup("locret", 0.7, 512), cut=4))
    assert table_rows(text)[1][:5] == ["full", "not quantized", "all", "any", "not in this run"]
    assert "nothing to compare with" in text
    assert "8 prompts were cut to fit; in 4 of them" in text


def test_a_map_of_needles_is_one_figure_and_says_what_does_not_fit(report, tmp_path):
    text = report(needle_map())
    rows = table_rows(text)
    assert rows[1][:5] == ["full", "not quantized", "all", "any", "100.0 (34.2-100.0)"]
    assert [row[0] for row in rows[4:7]] == ["task", "niah_single@1024", "niah_single@2048"]
    assert rows[5][3:] == ["100.0 (34.2-100.0)", "100.0 (34.2-100.0)", "0.0 (0.0-65.8)"]
    assert rows[6][3] == "-"
    assert "2 samples did not fit into the device's memory and count in no figure." in text
    assert figures(tmp_path) == ["00-result0-budget.png", "00-result0-needles.png"]


def test_needles_at_equal_bytes_are_tables_and_a_figure(report, tmp_path):
    text = report(at_equal_bytes("full", "knorm"))
    assert "heads runs/heads" in text
    head, *rows = table_rows(text)
    assert head == HEADER
    assert [[*row[:4], *row[6:8]] for row in rows[:4]] == [
        ["full", "not quantized", "all", "any", "100", "1.5"],
        ["full", "kivi bits=4", "all", "any", "400", "1.5"],
        ["knorm", "not quantized", "8x bytes", "query-agnostic", "100", "1.5"],
        ["knorm", "kivi bits=4", "8x bytes", "query-agnostic", "400", "1.5"],
    ]
    assert rows[0][4] == "66.7 (30.0-90.3)"
    assert rows[2][8] == "0.375"
    assert [row[:3] for row in rows[5:]] == [
        ["niah_single@300", "found", "3"],
        ["passkey@300", "found", "3"],
    ]
    assert figures(tmp_path) == ["00-result0-budget.png", "00-result0-bytes.png"]


def test_needles_without_the_full_cache_or_a_policy(report, tmp_path):
    assert "not in this run" in report(at_equal_bytes("knorm"))
    assert len(figures(tmp_path)) == 2
    assert "not in this run" not in report(at_equal_bytes("full"))


def test_systems_are_compared_and_failures_told(report, tmp_path):
    record = benchmark(("locret", "ok"), ("full", "out of memory"))
    rows = table_rows(report(record))
    assert rows[1][:4] == ["full", "65,536", "1", "out of memory"]
    assert rows[2][:7] == ["locret", "65,536", "1", "2", "65,536", "1.50", "40.0"]
    assert figures(tmp_path) == ["00-result0-speed.png"]
    assert table_rows(report(benchmark(("locret", "ok"))))[1][3] == "not in this run"


def test_rows_of_other_benchmarks_are_shown_as_they_are(report, tmp_path):
    keys = [
        {"depth": 0.1, "status": "ok", "found": True, "answer": " 42.", "seconds": [1.0, 2.0]},
        {"depth": 0.9, "status": "out of time"},
    ]
    named = {"kivi-4": {"found": 1234}}
    record = benchmark() | {"figures": {"window": 8192, "results": keys, "systems": named}}
    assert table_rows(report(record)) == [
        ["figure", "value"],
        ["window", "8,192"],
        ["depth", "status", "found", "answer"],
        ["0.1", "ok", "yes", "42."],
        ["0.9", "out of time", "-", "-"],
        ["systems", "found"],
        ["kivi-4", "1,234"],
    ]
    assert figures(tmp_path) == []


def test_the_committed_results_make_a_report(tmp_path, capsys):
    committed = sorted(str(path) for path in (ROOT / "docs" / "results").glob("*.json"))
    out = tmp_path / "new" / "report"
    assert main(["report", *committed, "--out", str(out), "--title", "All of it"]) == 0
    assert str(out / "report.md") in capsys.readouterr().out
    text = (out / "report.md").read_text()
    assert text.startswith("# All of it\n")
    for path in committed:
        assert Path(path).name in text
    assert "97.5 (94.3-98.9)" in text  # 195 of 200


def test_the_page_needs_no_other_file(report, tmp_path):
    record = needle_map()
    record["manifest"]["config"]["model"] = "a <b> & c"
    report(record, evaluation(FULL, setup("locret", 0.7, 512)))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a &lt;b&gt; &amp; c" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 3
    assert all(base64.b64decode(image).startswith(PNG) for image in images)
    text = (tmp_path / "out" / "report.md").read_text()
    for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (tmp_path / "out" / link).read_bytes().startswith(PNG)


def broken(result, *path):
    """The result without what stands at the path."""
    result = json.loads(json.dumps(result))
    inner = result
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return result


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        ("[1, 2]", "no result that is known here"),
        ('{"kind": "other"}', "no result that is known here"),
        (evaluation(FULL) | {"format": 1}, "or `locret grid` (format 2)"),
        (broken(evaluation(FULL), "setups", 0, "interval"), "not whole (KeyError: 'interval')"),
        (broken(evaluation(FULL), "manifest"), "not whole (KeyError: 'manifest')"),
        (
            broken(needle_map(), "manifest", "config", "depths"),
            "not whole (KeyError: 'depths')",
        ),
        (benchmark(("full", "ok")) | {"settings": None}, "not whole"),
    ],
)
def test_what_is_no_result_is_named_and_nothing_is_written(content, says, tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(evaluation(FULL)))
    bad.write_bytes(
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        make_report([good, bad], tmp_path / "out")
    assert "bad.json" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "good.json"]


def test_a_missing_file_is_one_line_on_stderr(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")]) == 2
    assert "none.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no files"):
        make_report([], tmp_path / "out")


def test_a_report_is_replaced_and_other_files_stay(report, tmp_path):
    report(evaluation(FULL))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "locret" in report(evaluation(FULL, setup("locret", 0.7, 512)))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_cells_are_escaped(tmp_path):
    table = Table(["a", "b"], [["x|y", "<i>"]])
    assert "| x\\|y | <i> |" in markdown_of([table])
    assert "<td>x|y</td><td>&lt;i&gt;</td>" in html_of([table], tmp_path)
