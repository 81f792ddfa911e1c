"""Results as tables: in Markdown and HTML for files, in plain text for a terminal.

A report (`locret.evaluation.report`) is made of blocks, which are written either way.
"""

import base64
import html
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locret.evaluation import results
from locret.evaluation.config import FULL, in_words
from locret.evaluation.results import Line, Result

MIB = 2**20
WIDTH = 100
INDENT = 14

# ---- blocks --------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: 0.25em 0.6em; white-space: nowrap; }
th { background: #f3f3f3; } td + td { text-align: right; } img { max-width: 100%; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the report's title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of plain text under a header; numbers stand to the right of the first columns, `texts`
    of them."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


@dataclass(frozen=True)
class Figure:
    """A picture: its file, within the report's folder, and what it shows."""

    file: Path
    caption: str


Block = Heading | Paragraph | Table | Figure


def markdown_of(blocks: Sequence[Block]) -> str:
    """The report with links to its pictures."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def html_of(blocks: Sequence[Block], folder: Path) -> str:
    """The report as one file that needs no other: pictures, read from `folder`, are inlined."""
    title = next((b.text for b in blocks if isinstance(b, Heading)), "Report")
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Figure):
        return f"![{block.caption}]({block.file.as_posix()})"
    aligned = ["---"] * block.texts + ["---:"] * (len(block.header) - block.texts)
    lines = [block.header, aligned, *block.rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Figure):
        data = base64.b64encode((folder / block.file).read_bytes()).decode()
        caption = html.escape(block.caption)
        return (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in block.rows
    )
    return f"<table>\n<tr>{head}</tr>\n{rows}\n</table>"


# ---- the table of an evaluation, and its part of a report ----------------------------------------


def as_markdown(result: Result) -> str:
    """A line for each setup, a column for each task, in per cent."""
    tasks = results.tasks_of(result)
    scores = [
        (task, metric) for task in tasks for metric in (None, *results.others_of(result, task))
    ]
    short, shares = _short_names(tasks), results.has_shares(result)
    head = ["policy", "budget", "protocol", "mean", "to full", *["share of full"] * shares]
    head += ["units", "MiB", *(" ".join(filter(None, (short[t], m))) for t, m in scores)]
    lines = []
    for setup in result["setups"]:
        cells = {cell["task"]: cell for cell in results.cells_of(result, setup)}
        lines.append(
            [
                results.stored_name(setup),
                budget_text(setup),
                setup["protocol"],
                *scores_of(setup, shares),
                units_text(setup["units"], "{:.0f}"),
                mean_of(setup["bytes"], "{:.1f}", MIB),
                *(_score(cells.get(task), metric) for task, metric in scores),
            ]
        )
    return markdown_of([Table(head, lines, texts=3), Paragraph(" ".join(notes(result, mark=True)))])


def budget_text(setup: Mapping[str, Any]) -> str:
    return "all" if setup["budget"] is None else str(setup["budget"])


def mean_of(spread: Mapping[str, float] | None, form: str, unit: int = 1) -> str:
    return "-" if spread is None else form.format(spread["mean"] / unit)


def units_text(spread: Mapping[str, float] | None, form: str) -> str:
    """Units a head holds on average; where heads differ, fewest and most too: `512 (26-2048)`."""
    if spread is None or "most" not in spread:
        return mean_of(spread, form)
    mean, fewest, most = (form.format(spread[name]) for name in ("mean", "fewest", "most"))
    return f"{mean} ({fewest}-{most})"


def with_interval(
    value: float | None, interval: Sequence[float] | None, signed: bool = False
) -> str:
    """A score and its interval in per cent: `41.0 (36.2-45.5)`."""
    if value is None or interval is None:
        return "-"
    form, to = ("+.1f", " to ") if signed else (".1f", "-")
    low, high = (format(100 * bound, form) for bound in interval)
    return f"{format(100 * value, form)} ({low}{to}{high})"


def scores_of(setup: Mapping[str, Any], shares: bool) -> list[str]:
    """The score of a setup, its difference to the full cache and, with `shares`, its share."""
    change = with_interval(setup.get("difference"), setup.get("difference_interval"), signed=True)
    share = with_interval(setup.get("share"), setup.get("share_interval"))
    return [with_interval(setup["score"], setup["interval"]), change, *[share] * shares]


def _score(cell: Mapping[str, Any] | None, metric: str | None) -> str:
    if cell is None or cell["score"] is None:
        return "-"
    score = cell["score"] if metric is None else cell["others"][metric]["score"]
    return f"{100 * score:.1f}" + "*" * bool(cell["cut"])


def _short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Task labels without what all of them share: the family in front, the length behind."""
    shared = len({task.partition("@")[2] for task in tasks}) == 1
    short = {task: task.partition("@")[0] if shared else task for task in tasks}
    families = {name.partition("_")[0] for name in short.values()}
    if len(tasks) > 1 and len(families) == 1 and shared:
        short = {task: name.partition("_")[2] for task, name in short.items()}
    return short


def notes(result: Result, mark: bool = False) -> list[str]:
    """What is to be said below a table, whose cells with prompts that were cut have an asterisk if
    `mark`."""
    cells = result["cells"]
    counts = sorted({cell["count"] for cell in cells})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    said = [f"Per cent, {several} samples a task, with 95 % intervals."]
    cut = sum(cell["cut"] for cell in cells)
    if cut:
        lost = sum(cell["answer_cut"] for cell in cells)
        star = "\\* " if mark else ""
        said.append(
            f"{star}{cut} prompts were cut to fit; in {lost} of them an answer was cut away."
        )
    failed = sum(cell["failed"] for cell in cells)
    if failed:
        said.append(
            f"{failed} samples did not fit into the device's memory and count in no figure."
        )
    return said


PROTOCOLS = {"any": "any", "query_agnostic": "query-agnostic", "query_aware": "query-aware"}
HEADER = ["policy", "cache", "budget", "protocol", "score", "to full", "units", "MiB", "of full"]


def evaluation_blocks(result: Result) -> Iterator[Block]:
    """Where the figures come from, the table of setups, the table of tasks."""
    yield Paragraph(_origin(result["manifest"]))
    yield _setups_table(result)
    said = notes(result)
    if results.full_of(result) is None:
        said.append("The full cache was not run, so that there is nothing to compare with.")
    yield Paragraph(" ".join(said))
    tasks = results.tasks_of(result)
    if len(tasks) > 1 or results.others_of(result, tasks[0]):
        yield _tasks_table(result)
        if results.has_shares(result):
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
    shares = results.has_shares(result)
    header = [*HEADER[:6], *["share of full"] * shares, *HEADER[6:]]
    lines = [_line(setup, shares) for setup in _ordered(result)]
    if results.full_of(result) is None:
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
        budget_text(setup),
        PROTOCOLS[setup["protocol"]],
        *scores_of(setup, shares),
        units_text(setup["units"], "{:,.0f}"),
        mean_of(setup["bytes"], "{:,.1f}", MIB),
        share,
    ]


def _tasks_table(result: Result, figure: str = "score", interval: str = "interval") -> Table:
    """A line for each score of a task, a column for each setup."""
    setups = _ordered(result)
    cells = {
        (cell["task"], setup["setup"]): cell
        for setup in setups
        for cell in results.cells_of(result, setup)
    }
    lines = []
    for task in results.tasks_of(result):
        found: list[Any] = [cells.get((task, setup["setup"])) for setup in setups]
        first = next(cell for cell in found if cell)
        for metric in (first["metric"], *results.others_of(result, task)):
            of = [c and (c if metric == first["metric"] else c["others"][metric]) for c in found]
            scores = [with_interval(c.get(figure), c.get(interval)) if c else "-" for c in of]
            lines.append([task, metric, str(first["count"]), *scores])
    return Table(["task", "metric", "n", *(setup["setup"] for setup in setups)], lines)


# ---- plain text ----------------------------------------------------------------------------------


Column = tuple[str, int, Callable[[Line], str]]
"""Heading, width and what stands there."""

NAMED: list[Column] = [("asked", 6, lambda line: line.asked)]
UNEQUAL: list[Column] = [("heads keep", 15, lambda line: line.heads or "alike")]
"""Where heads differ."""
KEPT: list[Column] = [
    ("real", 6, lambda line: f"{line.real:.1f}x"),
    ("found", 8, lambda line: f"{line.found}/{line.asked_of}"),
    ("of full", 9, lambda line: line.of_full),
    ("context kept", 15, lambda line: f"{line.units:,}/{line.context_tokens:,}"),
    ("MiB", 7, lambda line: f"{line.context_bytes / MIB:.1f}"),
    ("rest", 6, lambda line: str(line.rest_tokens)),
    ("MiB", 7, lambda line: f"{max(line.bytes - line.context_bytes, 0) / MIB:.1f}"),
    ("cache MiB", 11, lambda line: f"{line.bytes / MIB:.1f}"),
    ("seconds", 9, lambda line: f"{line.seconds:.1f}"),
]
EQUAL_BYTES: list[Column] = [
    ("units", 8, lambda line: f"{line.units:,}"),
    ("KiB", 10, lambda line: f"{line.context_bytes / 1024:,.0f}"),
    ("real", 7, lambda line: f"{line.real_context:.1f}x"),
    ("found", 9, lambda line: f"{line.found}/{line.asked_of}"),
]


def as_text(result: Result) -> str:
    """Needles for a terminal: over lengths, at equal bytes, or what one length took."""
    lines = results.lines_of(result)
    if len({cell["length"] for cell in result["cells"]}) > 1:
        table, legend = _over_lengths(result), _legend(result)[:2]
    elif any(" bytes" in budget_text(setup) for setup in result["setups"]):
        table, legend = _table(lines, EQUAL_BYTES), _legend_of_bytes(result)
    else:
        table, legend = _table(lines, KEPT), _legend(result)
    said = [*(f"{term:<{INDENT}}{text}" for term, text in legend), *notes(result)[1:]]
    wrapped = (textwrap.fill(line, WIDTH, subsequent_indent=" " * INDENT) for line in said)
    return "\n".join([table, "", *wrapped])


def _table(lines: Sequence[Line], columns: Sequence[Column]) -> str:
    width = max(15, *(len(line.name) + 1 for line in lines))
    columns = [*NAMED, *columns, *(UNEQUAL if any(line.heads for line in lines) else [])]
    head = f"{'policy':<{width}}" + "".join(f"{title:>{size}}" for title, size, _ in columns)
    rows = [
        f"{line.name:<{width}}" + "".join(f"{show(line):>{size}}" for _, size, show in columns)
        for line in lines
    ]
    return "\n".join([head, *rows])


def _over_lengths(result: Result) -> str:
    """The share found at each length, then how many times smaller the whole cache is."""
    lengths = sorted({cell["length"] for cell in result["cells"]})
    lines = {}
    for length in lengths:
        cells = [cell for cell in result["cells"] if cell["length"] == length]
        of_length = results.lines_of({"cells": cells, "setups": result["setups"]})
        lines[length] = {(line.name, line.asked): line for line in of_length}
    names = dict.fromkeys(name for each in lines.values() for name in each)

    def table(title: str, show: Callable[[Line], str]) -> list[str]:
        width = max(20, *(len(name) + 1 for name, _ in names))
        shown = [f"{title:<{width}}{'asked':>6}" + "".join(f"{n:>9,}" for n in lengths)]
        for name, asked in names:
            of_lengths = (lines[length].get((name, asked)) for length in lengths)
            cells = (show(line) if line else "-" for line in of_lengths)
            shown.append(f"{name:<{width}}{asked:>6}" + "".join(f"{cell:>9}" for cell in cells))
        return shown

    found = table("share found", lambda line: f"{line.found / line.asked_of:.2f}")
    return "\n".join([*found, "", *table("real", lambda line: f"{line.real:.1f}x")])


def _legend(result: Result) -> list[tuple[str, str]]:
    with_full = results.full_of(result) is not None
    whole = "cache MiB of policy full" if with_full else "MiB of the keys and values of all tokens"
    return [
        ("asked", "tokens of the prompt for every unit of the budget"),
        ("real", f"{whole} / cache MiB of the line"),
        *([("of full", "found, of those that policy full finds")] if with_full else []),
        ("context kept", "units a KV head keeps on average, of the tokens before the question"),
        (
            "rest",
            "tokens that no policy evicts: the question and the answer; their MiB include room for "
            "a longer answer",
        ),
    ]


def _legend_of_bytes(result: Result) -> list[tuple[str, str]]:
    asked = results.full_of(result) is not None
    whole = "bytes of the context under policy full" if asked else "those of all keys and values"
    said = [
        (
            "asked",
            "tokens of the prompt for every unit in 16 bits; fewer bits get as many units as fit "
            "into the same bytes",
        ),
        ("KiB", "of the compressed context; the question and the answer come on top"),
        ("real", f"{whole} / those of the line"),
    ]
    dtypes = {facts.get("dtype") for facts in result["manifest"].get("computed", [])}
    if "float32" in dtypes:
        said.append(
            (
                "float32",
                "the model computes in 32 bits, so that what is not quantized takes twice its "
                "bytes; with --dtype bfloat16 bytes are equal",
            )
        )
    return said
