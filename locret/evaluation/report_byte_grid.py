"""The part of a report about grids at equal bytes (`python -m locret grid`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from locret.evaluation import byte_grid_figure
from locret.evaluation.byte_grid import ByteSummary, notes, summarize, times_smaller
from locret.evaluation.local_needles import MARK
from locret.evaluation.report_blocks import Block, Paragraph, Table
from locret.evaluation.report_evaluation import per_cent
from locret.evaluation.report_needle import MIB, PROTOCOL, wilson

AWARE = "Query-aware: policies see the question before they evict."


def blocks(record: Mapping[str, Any]) -> Iterator[Block]:
    """What was asked, and a row for each policy, ratio and number of bits."""
    settings, manifest = record["settings"], record["manifest"]
    needle = settings["needle"]
    parts = [f"Model {manifest['model']}"] if "model" in manifest else []
    parts += [f"{name} {manifest[name]}" for name in ("adapter", "heads") if manifest.get(name)]
    parts.append(f"prompts of {needle['tokens']:,} tokens, tasks {', '.join(needle['tasks'])}")
    parts.append(f"{settings['quantization']} below 16 bits, groups of {settings['group']}")
    yield Paragraph(f"{', '.join(parts)}. {AWARE if settings.get('query_aware') else PROTOCOL}")
    rows = summarize(record["results"])
    names = list(dict.fromkeys(task for row in rows for task in row.by_task))
    header = ["policy", "asked", "bits", "units", "MiB", "real", "found", "n", *names]
    lines = [_line(row, rows, names) for row in rows]
    if all(row.budget is not None for row in rows):
        lines.insert(0, ["full", "1x", *["-"] * 4, "not in this run", *["-"] * (1 + len(names))])
    yield Table(header, lines)
    yield Paragraph("Per cent found, 95 % Wilson intervals.")
    yield from map(Paragraph, notes(record))


def _line(row: ByteSummary, rows: Sequence[ByteSummary], tasks: list[str]) -> list[str]:
    return [
        row.policy,
        f"{row.ratio}x",
        str(row.bits),
        "all" if row.budget is None else f"{row.budget:,}",
        f"{row.total_bytes / MIB:,.1f}",
        times_smaller(row, rows),
        per_cent(row.found / row.count, wilson(row.found, row.count)) + (MARK if row.local else ""),
        str(row.count),
        *(f"{100 * row.by_task[task]:.1f}" if task in row.by_task else "-" for task in tasks),
    ]


def figures(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Quality against bytes, a panel for each policy; none if no policy evicted."""
    if any(cell["budget"] is not None for cell in record["results"]):
        yield "bytes", "Quality against bytes", byte_grid_figure.figure(dict(record))
