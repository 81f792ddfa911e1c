"""The part of a report about benchmarks: speed and memory, from the JSON of `benchmarks/`.

Such a JSON holds `settings`, `figures`, `hardware` and `versions`. Rows of `figures["results"]`
that name a `system` are compared with the full cache and drawn over the lengths
(`benchmarks.longcontext`). Other figures are shown as they are: single numbers in one table, rows
(a list of objects, or an object of named ones) in a table each.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from locret.evaluation.figures import plotting
from locret.evaluation.report_blocks import Block, Paragraph, Table
from locret.evaluation.setups import FULL

OK = "ok"
COLUMNS = (
    ("first token, s", "first_token_seconds", ".3g"),
    ("prefill, tokens/s", "prefill_tokens_per_second", ",.0f"),
    ("x full", "prefill_speed_up", ".2f"),
    ("decode, tokens/s", "decode_tokens_per_second", ",.1f"),
    ("x full", "decode_speed_up", ".2f"),
    ("peak, GiB", "peak_gib", ".2f"),
    ("units", "units", ",.0f"),
)
"""Heading, the figure's name and its format."""
PANELS = {
    "seconds to the first token": "first_token_seconds",
    "decode tokens/s": "decode_tokens_per_second",
    "peak memory, GiB": "peak_gib",
}


def blocks(record: Mapping[str, Any]) -> Iterator[Block]:
    """Where the figures come from, and their table."""
    settings, figures = record["settings"], record["figures"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield Paragraph(f"{record['hardware']}; {versions}.")
    short = (
        f"{name} {value}"
        for name, value in settings.items()
        if isinstance(value, str | int | float | list) and len(str(value)) < 60
    )
    yield Paragraph(", ".join(short) + ".")
    numbers = [[name, _text(v)] for name, v in figures.items() if isinstance(v, int | float)]
    if numbers:
        yield Table(["figure", "value"], numbers)
    systems = _systems_of(figures)
    if systems:
        yield _systems(systems)
    for name, value in figures.items():
        rows = _rows(name, value)
        if rows and value is not systems:
            yield _plain(rows)


def figures(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Speed and memory over the lengths, a line a system; none for single figures."""
    done = [row for row in _systems_of(record["figures"]) if row["status"] == OK]
    if done:
        yield "speed", "Speed and memory against the length of the prompt", _over_lengths(done)


def _systems_of(figures: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    results: Sequence[Mapping[str, Any]] = figures.get("results", ())
    return results if all("system" in row for row in results) else ()


def _rows(name: str, value: Any) -> list[Mapping[str, Any]]:
    """Rows of a figure, if it has some; the names of named ones stand first."""
    if isinstance(value, Mapping):
        value = [{name: key} | dict(row) for key, row in value.items() if isinstance(row, Mapping)]
    if not isinstance(value, list):
        return []
    return [row for row in value if isinstance(row, Mapping)]


def _plain(rows: Sequence[Mapping[str, Any]]) -> Table:
    """All numbers and short texts of the rows, a column a name."""
    names = dict.fromkeys(
        name for row in rows for name, value in row.items() if isinstance(value, int | float | str)
    )
    return Table(list(names), [[_text(row.get(name)) for name in names] for row in rows])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value).strip()


def _systems(results: Sequence[Mapping[str, Any]]) -> Table:
    rows = sorted(results, key=lambda row: (row["length"], row["batch"], row["system"] != FULL))
    if not any(row["system"] == FULL for row in rows):
        rows.insert(0, {"system": FULL, "length": 0, "batch": 0, "status": "not in this run"})
    header = ["system", "tokens", "rows", *(heading for heading, _, _ in COLUMNS)]
    return Table(header, [_system(row) for row in rows])


def _system(row: Mapping[str, Any]) -> list[str]:
    head = [row["system"], f"{row['length']:,}", str(row["batch"])]
    if row["status"] != OK:
        return [*head, row["status"], *["-"] * (len(COLUMNS) - 1)]
    return head + [
        "-" if row.get(name) is None else format(row[name], form) for _, name, form in COLUMNS
    ]


def _over_lengths(rows: Sequence[Mapping[str, Any]]) -> Any:
    figure, axes = plotting().subplots(
        1, len(PANELS), figsize=(4.2 * len(PANELS), 3.6), layout="constrained"
    )
    lines = list(dict.fromkeys((row["system"], row["batch"]) for row in rows))
    for axis, (title, name) in zip(axes, PANELS.items(), strict=True):
        for system, batch in lines:
            points = sorted(
                (row["length"], row[name])
                for row in rows
                if (row["system"], row["batch"]) == (system, batch) and row.get(name) is not None
            )
            label = f"{system}, {batch} rows" if batch > 1 else system
            axis.plot(*zip(*points, strict=True) if points else ([], []), marker="o", label=label)
        axis.set(title=title, xlabel="tokens of the prompt")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:,.4g}K")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure
