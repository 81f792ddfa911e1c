"""The part of a report about one `python -m locret evaluate` result: tables and figures.

Scores are 0 to 1 in the JSON and per cent here, with the intervals that the JSON holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from locret.evaluation.figures import plotting
from locret.evaluation.report_blocks import Block, Paragraph, Table

Result = Mapping[str, Any]
FULL = "full"
MIB = 2**20
PROTOCOLS = {"any": "any", "query_agnostic": "query-agnostic", "query_aware": "query-aware"}


def blocks(result: Result) -> Iterator[Block]:
    """Where the figures come from, the table of rows, the table of tasks."""
    yield Paragraph(_origin(result["manifest"]))
    yield _rows_table(result)
    yield Paragraph(_notes(result))
    if len(_tasks(result)) > 1:
        yield _tasks_table(result)


def figures(result: Result) -> Iterator[tuple[str, str, Any]]:
    """Name, caption and matplotlib figure of each picture."""
    bounded = [row for row in result["rows"] if row["row"] != FULL]
    if any(row["quantization"] is None for row in bounded):
        caption = "Quality against budget: mean score over tasks, 95 % intervals"
        yield "budget", caption, _against_budget(result)
    if any(row["quantization"] is not None for row in result["rows"]):
        caption = "Quality against bytes: mean score over tasks, 95 % intervals"
        yield "bytes", caption, _against_bytes(result)


def _origin(manifest: Mapping[str, Any]) -> str:
    config = manifest["config"]
    parts = [f"Model {config['model']}"]
    parts += [f"{name} {config[name]}" for name in ("adapter", "heads") if config.get(name)]
    machines = [_machine(facts) for facts in manifest.get("computed", [])]
    return "; ".join([", ".join(parts), *dict.fromkeys(machines)]) + "."


def _machine(facts: Mapping[str, Any]) -> str:
    name = facts.get("hardware", {}).get("accelerator") or "CPU"
    return f"{name}, commit {facts['commit']}" if facts.get("commit") else name


def _full(result: Result) -> Mapping[str, Any] | None:
    return next((row for row in result["rows"] if row["row"] == FULL), None)


def _ordered(result: Result) -> list[Mapping[str, Any]]:
    """The rows, the full cache first."""
    return sorted(result["rows"], key=lambda row: row["row"] != FULL)


def _rows_table(result: Result) -> Table:
    header = [
        "policy", "cache", "budget", "protocol", "score", "to full", "units", "MiB", "of full"
    ]  # fmt: skip
    rows = [_row(row) for row in _ordered(result)]
    if _full(result) is None:
        rows.insert(0, [FULL, scheme(None), "all", "any", "not in this run", *["-"] * 4])
    return Table(header, rows)


def _row(row: Mapping[str, Any]) -> list[str]:
    share = row["bytes"]["mean"] / row["full_cache_bytes"]["mean"]
    return [
        row["name"],
        scheme(row["quantization"]),
        "all" if row["budget"] is None else str(row["budget"]),
        PROTOCOLS[row["protocol"]],
        per_cent(row["score"], row["interval"]),
        "-" if row["row"] == FULL else signed(row),
        f"{row['units']['mean']:,.0f}",
        f"{row['bytes']['mean'] / MIB:,.1f}",
        f"{share:.3f}",
    ]


def signed(row: Mapping[str, Any]) -> str:
    """The difference to the full cache on the same samples: `-1.2 (-3.0 to +0.5)`."""
    if row.get("difference") is None:
        return "-"
    low, high = row["difference_interval"]
    return f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def per_cent(score: float, interval: Sequence[float]) -> str:
    """`41.0 (36.2-45.5)`."""
    low, high = interval
    return f"{100 * score:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def scheme(quantization: Any) -> str:
    """How keys and values are stored, in words."""
    if quantization is None:
        return "not quantized"
    if isinstance(quantization, Mapping):
        return " ".join(f"{name}={value}" for name, value in quantization.items())
    return str(quantization)


def _tasks(result: Result) -> list[str]:
    return list(dict.fromkeys(cell["task"] for cell in result["cells"]))


def _tasks_table(result: Result) -> Table:
    labels = [row["row"] for row in _ordered(result)]
    cells = {(cell["task"], cell["row"]): cell for cell in result["cells"]}
    rows = []
    for task in _tasks(result):
        found = [cells.get((task, label)) for label in labels]
        first = next(cell for cell in found if cell)
        scores = [per_cent(c["score"], c["interval"]) if c else "-" for c in found]
        rows.append([task, first["metric"], str(first["count"]), *scores])
    return Table(["task", "metric", "n", *labels], rows)


def _notes(result: Result) -> str:
    counts = sorted({cell["count"] for cell in result["cells"]})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    notes = [f"Per cent, {several} samples a task, 95 % bootstrap intervals."]
    cut = sum(cell["cut"] for cell in result["cells"])
    if cut:
        lost = sum(cell["answer_cut"] for cell in result["cells"])
        notes.append(f"{cut} prompts were cut to fit; in {lost} of them an answer was cut away.")
    else:
        notes.append("No prompt was cut.")
    if _full(result) is None:
        notes.append("The full cache was not run, so that there is nothing to compare with.")
    return " ".join(notes)


Line = tuple[str, str, list[Mapping[str, Any]]]
"""Who (policy and protocol), how stored (empty where that is not told apart), and its rows."""

STYLES = ("-", "--", ":", "-.")


def _lines(rows: Sequence[Mapping[str, Any]], by_bytes: bool) -> list[Line]:
    """Rows of one line of a figure, from the smallest to the largest."""
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        who = row["name"]
        if row["protocol"] == "query_aware":
            who += f", {PROTOCOLS['query_aware']}"
        stored = scheme(row["quantization"]) if by_bytes else ""
        lines.setdefault((who, stored), []).append(row)
    key = "bytes" if by_bytes else "units"
    return [
        (*names, sorted(those, key=lambda row: row[key]["mean"])) for names, those in lines.items()
    ]


def _against_budget(result: Result) -> Any:
    rows = [r for r in result["rows"] if r["row"] != FULL and r["quantization"] is None]
    figure, axis = plotting().subplots(figsize=(8.5, 4.2), layout="constrained")
    _draw(axis, _lines(rows, by_bytes=False), lambda row: row["units"]["mean"])
    _draw_full(axis, _full(result))
    axis.set_xlabel("units held in a KV head after the context was compressed (mean)")
    return _finished(figure, axis)


def _against_bytes(result: Result) -> Any:
    rows = [row for row in result["rows"] if row["row"] != FULL]
    figure, axis = plotting().subplots(figsize=(8.5, 4.2), layout="constrained")
    _draw(axis, _lines(rows, by_bytes=True), lambda row: row["bytes"]["mean"] / MIB)
    _draw_full(axis, _full(result))
    axis.set_xlabel("MiB of the cache (mean)")
    return _finished(figure, axis)


def _draw(axis: Any, lines: Sequence[Line], across: Callable[[Mapping[str, Any]], float]) -> None:
    """A colour for each policy, a style for each way to store the cache; squares know the question.
    The best line is named first, and lines stand beside each other, so that none hides another."""
    colours = list(dict.fromkeys(who.partition(",")[0] for who, _, _ in lines))
    styles = list(dict.fromkeys(stored for _, stored, _ in lines))
    palette = plotting().get_cmap("tab10" if len(colours) <= 10 else "tab20")
    best_first = sorted(lines, key=lambda line: -max(row["score"] for row in line[2]))
    for at, (who, stored, rows) in enumerate(best_first):
        aside = 2 ** (0.02 * (at - (len(lines) - 1) / 2))
        scores = [100 * row["score"] for row in rows]
        below = [max(0.0, 100 * (row["score"] - row["interval"][0])) for row in rows]
        above = [max(0.0, 100 * (row["interval"][1] - row["score"])) for row in rows]
        axis.errorbar(
            [across(row) * aside for row in rows],
            scores,
            yerr=[below, above],
            color=palette(colours.index(who.partition(",")[0])),
            linestyle=STYLES[styles.index(stored) % len(STYLES)],
            marker="s" if "," in who else "o",
            markersize=5,
            capsize=2,
            label=f"{who}, {stored}" if stored else who,
        )


def _draw_full(axis: Any, full: Mapping[str, Any] | None) -> None:
    if full is None:
        return
    low, high = (100 * bound for bound in full["interval"])
    axis.axhline(100 * full["score"], color="black", linestyle="--", label="full cache")
    axis.axhspan(low, high, color="black", alpha=0.08)


def _finished(figure: Any, axis: Any) -> Any:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axis.set_ylabel("score, per cent")
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure
