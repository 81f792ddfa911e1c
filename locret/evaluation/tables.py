"""Results as text: a Markdown table of any evaluation, and plain ones of needles for a terminal."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from locret.evaluation.config import FULL, in_words

Result = Mapping[str, Any]
Cell = Mapping[str, Any]
MIB = 2**20
WIDTH = 100
INDENT = 14

# ---- Markdown ------------------------------------------------------------------------------------


def as_markdown(result: Result) -> str:
    """A line for each setup, a column for each task, in per cent."""
    tasks = tasks_of(result)
    scores = [(task, metric) for task in tasks for metric in (None, *others_of(result, task))]
    short, shares = _short_names(tasks), has_shares(result)
    head = ["policy", "budget", "protocol", "mean", "to full", *["share of full"] * shares]
    head += ["units", "MiB", *(" ".join(filter(None, (short[t], m))) for t, m in scores)]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for setup in result["setups"]:
        cells = {cell["task"]: cell for cell in cells_of(result, setup)}
        lines.append(
            [
                _name(setup),
                budget_text(setup),
                setup["protocol"],
                *scores_of(setup, shares),
                units_text(setup["units"], "{:.0f}"),
                mean_of(setup["bytes"], "{:.1f}", MIB),
                *(_score(cells.get(task), metric) for task, metric in scores),
            ]
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{' '.join(notes(result, mark=True))}\n"


def tasks_of(result: Result) -> list[str]:
    """Labels of the tasks, in the order of the table."""
    return list(dict.fromkeys(cell["task"] for cell in result["cells"]))


def cells_of(result: Result, setup: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of a setup, one for each task."""
    return [cell for cell in result["cells"] if cell["setup"] == setup["setup"]]


def others_of(result: Result, task: str) -> list[str]:
    """Names of the scores of a task beside its main one, where the result tells their figures."""
    cell = next(cell for cell in result["cells"] if cell["task"] == task)
    return list(cell.get("others", {}))


def has_shares(result: Result) -> bool:
    """Whether a setup tells its share of the full cache's score: old results do not."""
    return any("share" in setup for setup in result["setups"])


def full_of(result: Result) -> Mapping[str, Any] | None:
    """The setup of the full cache, if it was asked."""
    return next((setup for setup in result["setups"] if setup["setup"] == FULL), None)


def _name(setup: Mapping[str, Any]) -> str:
    """The policy, and how keys and values are stored, if not as they are."""
    stored = f" {in_words(setup['quantization'])}" if setup["quantization"] else ""
    return f"{setup['name']}{stored}"


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


# ---- plain text ----------------------------------------------------------------------------------


class Line:
    """What a setup found over all its samples, and the most tokens, units and bytes of one.

    `of_full`: found among those that the full cache finds. `real`: bytes of the full cache for one
    byte of this one; without the full cache, bytes of its keys and values. `units`: of a head on
    average. `heads`: of the head that holds fewest, and most; empty where all hold equally many.
    """

    def __init__(self, setup: Cell, cells: Sequence[Cell], of_full: Sequence[Cell] | None) -> None:
        def most(name: str, of: Sequence[Cell] = cells) -> float:
            return max(cell[name]["max"] for cell in of)

        def context(of: Sequence[Cell] = cells) -> float:
            return most("bytes", of) - most("room_bytes", of)

        aware = ", query-aware" if setup["protocol"] == "query_aware" else ""
        self.name = f"{_name(setup)}{aware}"
        budget = "1x" if setup["budget"] is None else str(setup["budget"])
        self.asked = budget.removesuffix(" bytes")
        found, by_full = _found(cells), None if of_full is None else _found(of_full)
        self.found = len(found)
        self.of_full = "-" if by_full is None else f"{len(found & by_full)}/{len(by_full)}"
        self.asked_of = sum(cell["count"] - cell["failed"] for cell in cells)
        full = most("bytes_after", of_full) if of_full else most("full_cache_bytes")
        self.real = full / max(1, most("bytes_after"))
        full = context(of_full) if of_full else most("full_cache_bytes")
        self.real_context = full / max(1, context())
        unequal = [cell["units"] for cell in cells if "most" in cell["units"]]
        fewest, largest = ([spread[name] for spread in unequal] for name in ("fewest", "most"))
        self.heads = f"{min(fewest):,}-{max(largest):,}" if unequal else ""
        mean = max(cell["units"]["mean"] for cell in cells)
        self.units = int(mean if unequal else most("units"))
        self.context_tokens = int(most("compressed_tokens"))
        self.rest_tokens = int(most("rest_tokens"))
        self.context_bytes = context()
        self.bytes = most("bytes_after")
        self.seconds = sum(cell["seconds"] for cell in cells)


def lines_of(result: Result) -> list[Line]:
    """One for each setup that has an answer."""
    full = full_of(result)
    of_full = None if full is None else _answered(result, full)
    answered = ((setup, _answered(result, setup)) for setup in result["setups"])
    return [Line(setup, cells, of_full) for setup, cells in answered if cells]


def _answered(result: Result, setup: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of a setup that have an answer."""
    return [cell for cell in cells_of(result, setup) if cell["units"] is not None]


def _found(cells: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """Task and sample of everything that was found."""
    return {
        (cell["task"], sample)
        for cell in cells
        for sample, score in zip(cell["samples"], cell["scores"], strict=True)
        if score == 1.0
    }


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
    lines = lines_of(result)
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
        of_length = lines_of({"cells": cells, "setups": result["setups"]})
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
    with_full = full_of(result) is not None
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
    asked = full_of(result) is not None
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
