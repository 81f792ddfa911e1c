"""One report of many results: tables and figures in Markdown, and in one HTML file.

    python -m locret report results/*.json --out report/

Read are the JSON files of `python -m locret evaluate` (which `needle` and `grid` write too) and of
`benchmarks/`. Written are `report.md` with its pictures in
`figures/`, and `report.html`, which needs no other file.

The JSON of a benchmark holds `settings`, `figures`, `hardware` and `versions`. Rows of
`figures["results"]` that name a `system` are compared with the full cache and drawn over the
lengths (`benchmarks.longcontext`). Other figures are shown as they are: single numbers in one
table, rows (a list of objects, or an object of named ones) in a table each.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locret.evaluation import figures, tables
from locret.evaluation.config import FULL, in_words
from locret.evaluation.report_blocks import (
    Block,
    Figure,
    Heading,
    Paragraph,
    Table,
    as_html,
    as_markdown,
)
from locret.evaluation.results import FORMAT, KIND
from locret.evaluation.tables import MIB, Result

# ---- evaluations ---------------------------------------------------------------------------------

PROTOCOLS = {"any": "any", "query_agnostic": "query-agnostic", "query_aware": "query-aware"}
HEADER = ["policy", "cache", "budget", "protocol", "score", "to full", "units", "MiB", "of full"]


def evaluation_blocks(result: Result) -> Iterator[Block]:
    """Where the figures come from, the table of setups, the table of tasks."""
    yield Paragraph(_origin(result["manifest"]))
    yield _setups_table(result)
    said = tables.notes(result)
    if tables.full_of(result) is None:
        said.append("The full cache was not run, so that there is nothing to compare with.")
    yield Paragraph(" ".join(said))
    tasks = tables.tasks_of(result)
    if len(tasks) > 1 or tables.others_of(result, tasks[0]):
        yield _tasks_table(result)
        if tables.has_shares(result):
            yield Paragraph("Shares of what the full cache finds on the same samples, in per cent.")
            yield _tasks_table(result, "share", "share_interval")


def _origin(manifest: Mapping[str, Any]) -> str:
    config = manifest["config"]
    named = [f"Model {config['model']}"]
    named += [f"{name} {config[name]}" for name in ("adapter", "heads") if config.get(name)]
    machines = [
        (facts.get("hardware", {}).get("accelerator") or "CPU")
        + (f", commit {facts['commit']}" if facts.get("commit") else "")
        for facts in manifest.get("computed", [])
    ]
    return "; ".join([", ".join(named), *dict.fromkeys(machines)]) + "."


def _ordered(result: Result) -> list[Mapping[str, Any]]:
    """The setups, the full cache first."""
    return sorted(result["setups"], key=lambda setup: setup["setup"] != FULL)


def _setups_table(result: Result) -> Table:
    shares = tables.has_shares(result)
    header = [*HEADER[:6], *["share of full"] * shares, *HEADER[6:]]
    lines = [_line(setup, shares) for setup in _ordered(result)]
    if tables.full_of(result) is None:
        missing = [FULL, in_words(None), "all", "any", "not in this run"]
        lines.insert(0, missing + ["-"] * (len(header) - len(missing)))
    return Table(header, lines)


def _line(setup: Mapping[str, Any], shares: bool) -> list[str]:
    share = "-"
    if setup["bytes"] is not None:
        share = f"{setup['bytes']['mean'] / setup['full_cache_bytes']['mean']:.3f}"
    return [
        setup["name"],
        in_words(setup["quantization"]),
        tables.budget_text(setup),
        PROTOCOLS[setup["protocol"]],
        *tables.scores_of(setup, shares),
        tables.units_text(setup["units"], "{:,.0f}"),
        tables.mean_of(setup["bytes"], "{:,.1f}", MIB),
        share,
    ]


def _tasks_table(result: Result, figure: str = "score", interval: str = "interval") -> Table:
    """A line for each score of a task, a column for each setup."""
    setups = _ordered(result)
    cells = {
        (cell["task"], setup["setup"]): cell
        for setup in setups
        for cell in tables.cells_of(result, setup)
    }
    lines = []
    for task in tables.tasks_of(result):
        found: list[Any] = [cells.get((task, setup["setup"])) for setup in setups]
        first = next(cell for cell in found if cell)
        for metric in (first["metric"], *tables.others_of(result, task)):
            of = [c and (c if metric == first["metric"] else c["others"][metric]) for c in found]
            scores = [
                tables.with_interval(c.get(figure), c.get(interval)) if c else "-" for c in of
            ]
            lines.append([task, metric, str(first["count"]), *scores])
    return Table(["task", "metric", "n", *(setup["setup"] for setup in setups)], lines)


# ---- speed and memory ----------------------------------------------------------------------------

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


def benchmark_blocks(record: Mapping[str, Any]) -> Iterator[Block]:
    """Where the figures come from, and their table."""
    settings, found = record["settings"], record["figures"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield Paragraph(f"{record['hardware']}; {versions}.")
    short = (
        f"{name} {value}"
        for name, value in settings.items()
        if isinstance(value, str | int | float | list) and len(str(value)) < 60
    )
    yield Paragraph(", ".join(short) + ".")
    numbers = [[name, _text(v)] for name, v in found.items() if isinstance(v, int | float)]
    if numbers:
        yield Table(["figure", "value"], numbers)
    systems = _systems_of(found)
    if systems:
        yield _systems(systems)
    for name, value in found.items():
        rows = _rows(name, value)
        if rows and value is not systems:
            yield _plain(rows)


def benchmark_figures(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Speed and memory over the lengths, a line a system; none for single figures."""
    done = [row for row in _systems_of(record["figures"]) if row["status"] == OK]
    if done:
        yield "speed", "Speed and memory against the length of the prompt", _over_lengths(done)


def _systems_of(found: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    results: Sequence[Mapping[str, Any]] = found.get("results", ())
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
    figure, axes = figures.plotting().subplots(
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


# ---- the report ----------------------------------------------------------------------------------

MARKDOWN, PAGE, FIGURES = "report.md", "report.html", "figures"


@dataclass(frozen=True)
class Kind:
    """A kind of result.

    Attributes:
        title: of its part of the report.
        is_it: whether a JSON object is one, by its names.
        blocks: its text and tables.
        figures: name, caption and matplotlib figure of each of its pictures.
    """

    title: str
    is_it: Callable[[Mapping[str, Any]], bool]
    blocks: Callable[[Any], Iterator[Block]]
    figures: Callable[[Any], Iterator[tuple[str, str, Any]]]


KINDS = (
    Kind(
        "Benchmarks of quality",
        lambda found: (found.get("kind"), found.get("format")) == (KIND, FORMAT),
        evaluation_blocks,
        figures.figures,
    ),
    Kind(
        "Speed and memory",
        lambda found: {"settings", "figures", "hardware", "versions"} <= found.keys(),
        benchmark_blocks,
        benchmark_figures,
    ),
)
"""The kinds of results, in the order of the report."""


Source = tuple[Path, Kind, Mapping[str, Any]]
"""A file of results, its kind and what it holds."""


def make_report(paths: Sequence[str | Path], out: str | Path, title: str = "Results") -> Path:
    """Write the report into the folder `out`, and return the HTML file; nothing is written where
    there are no files, one is no known result, or matplotlib is missing (ValueError)."""
    if not paths:
        raise ValueError("no files of results were given")
    sources = [read_source(Path(path)) for path in paths]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        folder = Path(aside)
        blocks = [Heading(1, title), *_all_blocks(sources, folder)]
        (folder / MARKDOWN).write_text(as_markdown(blocks), encoding="utf-8")
        (folder / PAGE).write_text(as_html(blocks, folder), encoding="utf-8")
        shutil.copytree(folder, out, dirs_exist_ok=True)
    return out / PAGE


def read_source(path: Path) -> Source:
    """Read a file of results; ValueError if it cannot be read, or is no result that is known."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    kind = next((k for k in KINDS if isinstance(content, dict) and k.is_it(content)), None)
    if kind is None:
        raise ValueError(
            f"{path} holds no result that is known here; expected the JSON of `locret evaluate`, "
            f"`locret needle` or `locret grid` (format {FORMAT}), or of one of benchmarks/"
        )
    return path, kind, content


def _all_blocks(sources: Sequence[Source], folder: Path) -> Iterator[Block]:
    for kind in KINDS:
        of_kind = [(i, source) for i, source in enumerate(sources) if source[1] is kind]
        if of_kind:
            yield Heading(2, kind.title)
        for number, source in of_kind:
            yield from _source_blocks(source, folder, number)


def _source_blocks(source: Source, folder: Path, number: int) -> Iterator[Block]:
    path, kind, content = source
    yield Heading(3, content.get("name") or path.stem)
    try:
        yield from list(kind.blocks(content))
        for name, caption, figure in kind.figures(content):
            file = Path(FIGURES) / f"{number:02d}-{path.stem}-{name}.png"
            figures.save(figure, folder / file)
            yield Figure(file, caption)
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} looks like a result of '{kind.title}', but is not whole ({what})"
        ) from error
    yield Paragraph(f"From {path.name}.")
