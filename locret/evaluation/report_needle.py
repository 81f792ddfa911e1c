"""The parts of a report about needles: single runs (`needle --json-out`) and grids."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from locret.evaluation import grid, heatmap, local_needles, needle
from locret.evaluation.report_blocks import Block, Paragraph, Table
from locret.evaluation.report_evaluation import per_cent

PROTOCOL = "Query-agnostic: the question is read after the context was compressed."
Z = 1.959964  # of a 95 % interval
MIB = 2**20
HELD = ("context kept", "units", "MiB")


def wilson(found: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), which has a width at 0 and 1 too."""
    share, square = found / count, Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    half *= Z / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def run_blocks(result: Mapping[str, Any]) -> Iterator[Block]:
    """Of `needle --json-out` without a grid."""
    settings = result["settings"]
    tasks = ", ".join(settings["tasks"])
    yield Paragraph(f"Prompts of {settings['tokens']:,} tokens, tasks {tasks}. {PROTOCOL}")
    summary = sorted(result["summary"], key=lambda row: row["policy"] != "full")
    names = list(dict.fromkeys(task for row in summary for task in row["by_task"]))
    header = ["policy", "asked", "real", "found", "n", "of full's", *HELD, *names]
    rows = [_summary_row(row, names, summary) for row in summary]
    if not summary or summary[0]["policy"] != "full":
        rows.insert(0, ["full", "1x", "-", "not in this run", *["-"] * (len(header) - 4)])
    yield Table(header, rows)
    local = settings.get("local_tokens", needle.NeedleSettings.local_tokens)
    yield Paragraph(
        f"Per cent found, 95 % Wilson intervals. {grid.ASKED} {grid.REAL.format(local=local)} "
        "Context kept: units in each KV head, of the tokens that were compressed. Units and MiB "
        "are those of the whole cache."
    )
    yield from map(Paragraph, local_needles.notes(result["results"], local))


def _summary_row(row: Mapping[str, Any], tasks: list[str], summary: list[Any]) -> list[str]:
    full = summary[0]["found"] if summary[0]["policy"] == "full" else None
    return [
        row["policy"],
        f"{row['ratio']}x",
        f"{summary[0]['bytes'] / row['bytes']:.1f}x" if full is not None else "-",
        per_cent(row["found"] / row["count"], wilson(row["found"], row["count"]))
        + (local_needles.MARK if row.get("local") else ""),
        str(row["count"]),
        f"{row['of_full']}/{full}" if full is not None else "-",
        *_held(row),
        *(f"{100 * row['by_task'][task]:.1f}" if task in row["by_task"] else "-" for task in tasks),
    ]


def _held(row: Mapping[str, Any]) -> list[str]:
    """What is held, for `HELD`; runs before the context was told apart lack it."""
    context = "-"
    if "context_units" in row:
        context = f"{row['context_units']:,}/{row['context_tokens']:,}"
    return [context, f"{row['units']:,}", f"{row['bytes'] / MIB:,.1f}"]


def grid_blocks(record: Mapping[str, Any]) -> Iterator[Block]:
    """Of a grid: per cent found at each length, over all depths."""
    settings, manifest = record["settings"], record["manifest"]
    parts = [f"Model {manifest['model']}"] if "model" in manifest else []
    parts += [f"{name} {manifest[name]}" for name in ("adapter", "heads") if manifest.get(name)]
    parts.append(f"{settings['depths']} depths, {settings['samples_per_cell']} sample(s) a cell")
    yield Paragraph(f"{', '.join(parts)}. {PROTOCOL}")
    lengths = settings["lengths"]
    runs = sorted(grid.runs_of(record["results"]), key=lambda run: run[0] != "full")
    rows = [[policy, f"{ratio}x", *_over_depths(record, policy, ratio)] for policy, ratio in runs]
    if not runs or runs[0][0] != "full":
        rows.insert(0, ["full", "1x", *["not in this run"] * len(lengths)])
    local = grid.local_tokens_of(record)
    header = ["policy", "asked", *(f"{length:,}" for length in lengths)]
    yield Table(header, rows)
    yield Paragraph(f"Per cent found over all depths, 95 % Wilson intervals. {grid.ASKED}")
    if smaller := [row for run in runs if (row := _smaller(record, *run))]:
        yield Table(["real", *header[1:]], smaller)
        yield Paragraph(grid.REAL.format(local=local))
    yield from map(Paragraph, local_needles.notes(record["results"], local))


def _smaller(record: Mapping[str, Any], policy: str, ratio: int) -> list[str] | None:
    """Of a run that evicts; None if nothing is known."""
    found = grid.times_smaller(record["results"], policy, ratio)
    if ratio == 1 or not found:
        return None
    sizes = (found.get(length) for length in record["settings"]["lengths"])
    return [policy, f"{ratio}x", *("-" if size is None else f"{size:.1f}x" for size in sizes)]


def _over_depths(record: Mapping[str, Any], policy: str, ratio: int) -> Iterator[str]:
    for length in record["settings"]["lengths"]:
        column = [
            cell
            for cell in record["results"]
            if (cell["policy"], cell["ratio"], cell["length"]) == (policy, ratio, length)
        ]
        answered = [cell["found"] for cell in column if cell["found"] is not None]
        if answered:
            found = sum(answered)
            share = per_cent(found / len(answered), wilson(found, len(answered)))
            yield local_needles.marked(share, column)
        else:
            yield "does not fit" if column else "-"


def grid_figures(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The heat maps of all policies in one figure."""
    yield "map", "Needles found by length and depth", heatmap.figure(dict(record))
