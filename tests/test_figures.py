"""A figure in README or docs is what the command printed beside it gives, at its defaults.

The JSON of a result records its settings: some command of the page that cites it must ask for just
these. Which one, the file it writes says.
"""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FREE = {"out", "plot", "device", "max_time", "folder", "there", "kvpress"}
"""Where to run, and for how long, changes no figure that came out."""


def read(page):
    return page.read_text(encoding="utf-8")


def commands_of(page):
    """The words of every `python -m ...` on a page, in a block or in running text."""
    found = re.findall(r"^python -m (?:[^\n\\]|\\\n)*", read(page), flags=re.MULTILINE)
    found += re.findall(r"`(python -m [^`]*)`", read(page))
    return [shlex.split(text.replace("\\\n", " "), comments=True)[2:] for text in found]


def cited(page):
    return sorted(set(re.findall(r"results/([\w.-]+)\.json\b", read(page))))


def written_by(command, name):
    """Whether a command writes the result of this name."""
    out = [b for a, b in zip(command, command[1:], strict=False) if a in ("--out", "--json-out")]
    return [Path(path).name for path in out] == [f"{name}.json"]


CITED = [(page, name) for page in PAGES for name in cited(page)]
RECORDS = {name: json.loads(read(RESULTS / f"{name}.json")) for _, name in CITED}
BENCHMARKS = [(page, name) for page, name in CITED if "figures" in RECORDS[name]]


def ids(cases):
    return [f"{page.stem}-{name}" for page, name in cases]


@pytest.mark.parametrize(("page", "name"), BENCHMARKS, ids=ids(BENCHMARKS))
def test_a_benchmark_was_run_as_the_page_says(page, name):
    shown = [
        command
        for command in commands_of(page)
        if command[0].startswith("benchmarks.") and written_by(command, name)
    ]
    assert len(shown) == 1, f"{page.name} cites {name}.json: print the one command that writes it"
    module = importlib.import_module(shown[0][0])
    asked = vars(module._parser().parse_args(shown[0][1:]))
    recorded = RECORDS[name]["settings"]
    asked = json.loads(json.dumps(asked, default=str))
    for setting in asked.keys() & recorded.keys() - FREE:
        assert asked[setting] == recorded[setting], setting


EVALUATIONS = [(page, name) for page, name in CITED if RECORDS[name].get("kind") == "evaluation"]


def as_asked(command):
    """Without what changes no answer."""
    at = command.index("--processes") if "--processes" in command else len(command)
    return command[:at] + command[at + 2 :]


@pytest.mark.parametrize(("page", "name"), EVALUATIONS, ids=ids(EVALUATIONS))
def test_an_evaluation_was_run_as_the_page_says(page, name):
    recorded = RECORDS[name]["manifest"]
    asked = shlex.split(recorded["command"])[2:]
    assert asked[asked.index("--config") + 1] == f"eval/{name}.yaml"
    assert as_asked(asked) in [as_asked(command) for command in commands_of(page)]
    now = yaml.safe_load(read(ROOT / "configs" / "eval" / f"{name}.yaml"))
    for setting in now.keys() - {"smoke", "batch_size"}:
        assert now[setting] == recorded["config"][setting], setting


def test_every_figure_that_is_cited_is_checked():
    known = {name for cases in (BENCHMARKS, EVALUATIONS) for _, name in cases}
    assert set(RECORDS) == known
