"""The part of a report about one evaluation: where it comes from, and its tables.

Scores are 0 to 1 in the JSON and per cent here, with the intervals that the JSON holds.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from locret.evaluation.report_blocks import Block, Paragraph, Table
from locret.evaluation.setups import FULL, in_words
from locret.evaluation.tables import (
    MIB,
    Result,
    budget_of,
    cells_of,
    full_of,
    mean_of,
    notes,
    tasks_of,
    with_interval,
)

PROTOCOLS = {"any": "any", "query_agnostic": "query-agnostic", "query_aware": "query-aware"}
HEADER = ["policy", "cache", "budget", "protocol", "score", "to full", "units", "MiB", "of full"]


def blocks(result: Result) -> Iterator[Block]:
    """Where the figures come from, the table of setups, the table of tasks."""
    yield Paragraph(_origin(result["manifest"]))
    yield _setups_table(result)
    said = notes(result)
    if full_of(result) is None:
        said.append("The full cache was not run, so that there is nothing to compare with.")
    yield Paragraph(" ".join(said))
    if len(tasks_of(result)) > 1:
        yield _tasks_table(result)


def _origin(manifest: Mapping[str, Any]) -> str:
    config = manifest["config"]
    named = [f"Model {config['model']}"]
    named += [f"{name} {config[name]}" for name in ("adapter", "heads") if config.get(name)]
    machines = [_machine(facts) for facts in manifest.get("computed", [])]
    return "; ".join([", ".join(named), *dict.fromkeys(machines)]) + "."


def _machine(facts: Mapping[str, Any]) -> str:
    name = facts.get("hardware", {}).get("accelerator") or "CPU"
    return f"{name}, commit {facts['commit']}" if facts.get("commit") else name


def _ordered(result: Result) -> list[Mapping[str, Any]]:
    """The setups, the full cache first."""
    return sorted(result["setups"], key=lambda setup: setup["setup"] != FULL)


def _setups_table(result: Result) -> Table:
    lines = [_line(setup) for setup in _ordered(result)]
    if full_of(result) is None:
        lines.insert(0, [FULL, in_words(None), "all", "any", "not in this run", *["-"] * 4])
    return Table(HEADER, lines)


def _line(setup: Mapping[str, Any]) -> list[str]:
    share = "-"
    if setup["bytes"] is not None:
        share = f"{setup['bytes']['mean'] / setup['full_cache_bytes']['mean']:.3f}"
    return [
        setup["name"],
        in_words(setup["quantization"]),
        budget_of(setup),
        PROTOCOLS[setup["protocol"]],
        with_interval(setup["score"], setup["interval"]),
        with_interval(setup.get("difference"), setup.get("difference_interval"), signed=True),
        mean_of(setup["units"], "{:,.0f}"),
        mean_of(setup["bytes"], "{:,.1f}", MIB),
        share,
    ]


def _tasks_table(result: Result) -> Table:
    setups = _ordered(result)
    cells = {
        (cell["task"], setup["setup"]): cell for setup in setups for cell in cells_of(result, setup)
    }
    lines = []
    for task in tasks_of(result):
        found: list[Any] = [cells.get((task, setup["setup"])) for setup in setups]
        first = next(cell for cell in found if cell)
        scores = [with_interval(c["score"], c["interval"]) if c else "-" for c in found]
        lines.append([task, first["metric"], str(first["count"]), *scores])
    return Table(["task", "metric", "n", *(setup["setup"] for setup in setups)], lines)
