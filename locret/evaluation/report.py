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

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from locret.evaluation import tables
from locret.evaluation.config import FULL, in_words
from locret.evaluation.results import FORMAT, KIND, Result, cells_of, full_of
from locret.system.files import check_file

Picture = tuple[str, str, Any]
"""Name, caption and matplotlib figure."""

# ---- pictures of an evaluation -------------------------------------------------------------------


def plotting() -> Any:
    """`matplotlib.pyplot` without a screen; ValueError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures need the package matplotlib: pip install 'locret[eval]'")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_figure(path: Path) -> None:
    """Refuse a figure that could not be drawn in the end (ValueError): matplotlib is not installed,
    it is no such file, or it is a folder."""
    plotting()
    kinds = ("jpg", "pdf", "png", "svg")
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{str(path)!r}: a figure's name ends in one of {', '.join(kinds)}")
    check_file(path, "the figure")


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure in the format that the path's ending names, and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plotting().close(figure)
    return path


def evaluation_figures(result: Result) -> Iterator[Picture]:
    """The pictures of an evaluation."""
    bounded = [setup for setup in _scored(result) if setup["setup"] != FULL]
    if any(setup["quantization"] is None for setup in bounded):
        caption = "Quality against budget: mean score over tasks, 95 % intervals"
        yield "budget", caption, against(result, bytes=False)
    if any(setup["quantization"] is not None for setup in _scored(result)):
        caption = "Quality against bytes: mean score over tasks, 95 % intervals"
        yield "bytes", caption, against_bytes(result)
    if len({cell["length"] for cell in _placed(result["cells"])}) > 1:
        yield "needles", "Share of needles found by length and depth", needle_map(result)


def _scored(result: Result) -> list[Mapping[str, Any]]:
    """The setups that have a score."""
    return [setup for setup in result["setups"] if setup["score"] is not None]


# ---- quality against budget and bytes ------------------------------------------------------------


Line = tuple[str, str, list[Mapping[str, Any]]]
"""Who (policy and protocol), how stored (empty where that is not told apart), and its setups."""

STYLES = ("-", "--", ":", "-.")


def _lines(setups: Sequence[Mapping[str, Any]], by_bytes: bool) -> list[Line]:
    """The lines of a figure, the setups of each from the smallest to the largest."""
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for setup in setups:
        who = setup["name"]
        if setup["protocol"] == "query_aware":
            who += ", query-aware"
        stored = in_words(setup["quantization"]) if by_bytes else ""
        lines.setdefault((who, stored), []).append(setup)
    key = "bytes" if by_bytes else "units"
    return [
        (*names, sorted(those, key=lambda setup: setup[key]["mean"]))
        for names, those in lines.items()
    ]


def against(result: Result, bytes: bool) -> Any:
    """Scores against the bytes of the cache, or against the units that heads keep."""
    setups = [
        setup
        for setup in _scored(result)
        if setup["setup"] != FULL and (bytes or setup["quantization"] is None)
    ]
    key, unit = ("bytes", tables.MIB) if bytes else ("units", 1)
    figure, axis = plotting().subplots(figsize=(8.5, 4.2), layout="constrained")
    _draw(axis, _lines(setups, bytes), lambda setup: setup[key]["mean"] / unit)
    full = full_of(result)
    if full is not None:
        low, high = (100 * bound for bound in full["interval"])
        axis.axhline(100 * full["score"], color="black", linestyle="--", label="full cache")
        axis.axhspan(low, high, color="black", alpha=0.08)
    units = "units held in a KV head after the context was compressed (mean)"
    axis.set_xlabel("MiB of the cache (mean)" if bytes else units)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axis.set_ylabel("score, per cent")
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


against_bytes = partial(against, bytes=True)


def _draw(axis: Any, lines: Sequence[Line], across: Callable[[Mapping[str, Any]], float]) -> None:
    """A colour for each policy, a style for each way to store the cache; squares know the question.
    The best line is named first, and lines stand beside each other, so that none hides another."""
    colours = list(dict.fromkeys(who.partition(",")[0] for who, _, _ in lines))
    styles = list(dict.fromkeys(stored for _, stored, _ in lines))
    palette = plotting().get_cmap("tab10" if len(colours) <= 10 else "tab20")
    best_first = sorted(lines, key=lambda line: -max(setup["score"] for setup in line[2]))
    for at, (who, stored, setups) in enumerate(best_first):
        aside = 2 ** (0.02 * (at - (len(lines) - 1) / 2))
        scores = [100 * setup["score"] for setup in setups]
        below = [max(0.0, 100 * (setup["score"] - setup["interval"][0])) for setup in setups]
        above = [max(0.0, 100 * (setup["interval"][1] - setup["score"])) for setup in setups]
        axis.errorbar(
            [across(setup) * aside for setup in setups],
            scores,
            yerr=[below, above],
            color=palette(colours.index(who.partition(",")[0])),
            linestyle=STYLES[styles.index(stored) % len(STYLES)],
            marker="s" if "," in who else "o",
            markersize=5,
            capsize=2,
            label=f"{who}, {stored}" if stored else who,
        )


# ---- needles by length and depth -----------------------------------------------------------------

ACROSS = 4  # in a line


def _placed(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The cells of tasks whose samples have a depth."""
    return [cell for cell in cells if "depths" in cell]


def needle_map(result: Result) -> Any:
    """A panel for each setup: length across, depth down; grey where nothing was answered."""
    setups = result["setups"]
    lengths = sorted({cell["length"] for cell in _placed(result["cells"])})
    across = min(ACROSS, len(setups))
    down = -(-len(setups) // across)
    figure, axes = plotting().subplots(
        down,
        across,
        figsize=(3.4 * across + 1, 3.0 * down + 0.4),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    depths = result["manifest"]["config"]["depths"]
    for place, axis in enumerate(axes.flat):
        if place < len(setups):
            image = _panel(axis, result, setups[place], lengths, depths)
        else:
            axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("depth of the needle", fontsize=8)
    figure.colorbar(image, ax=axes, label="share found", shrink=0.8)
    return figure


def _panel(
    axis: Any, result: Result, setup: Mapping[str, Any], lengths: Sequence[int], depths: int
) -> Any:
    found = shares(_placed(cells_of(result, setup)), depths)
    values = [[found.get((n, row), float("nan")) for n in lengths] for row in range(depths)]
    axis.set_facecolor("lightgrey")
    image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    budget = "" if setup["budget"] is None else f", {tables.budget_text(setup)}"
    stored = f", {in_words(setup['quantization'])}" if setup["quantization"] else ""
    axis.set_title(f"{setup['name']}{budget}{stored}", fontsize=9)
    ticks = [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in lengths]
    axis.set_xticks(range(len(lengths)), ticks, fontsize=8)
    labels = [f"{(row + 0.5) / depths:.0%}" for row in range(depths)]
    axis.set_yticks(range(depths), labels, fontsize=8)
    axis.set_xlabel("tokens", fontsize=8)
    return image


def shares(cells: Sequence[Mapping[str, Any]], depths: int) -> dict[tuple[int, int], float]:
    """Share found by length and number of the depth, 0 = shallowest; those with an answer."""
    found: dict[tuple[int, int], list[float]] = {}
    for cell in cells:
        for depth, score in zip(cell["depths"], cell["scores"], strict=True):
            if score is not None:
                found.setdefault((cell["length"], int(depth * depths)), []).append(score)
    return {place: sum(scores) / len(scores) for place, scores in found.items()}


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
SPEEDS = {
    "seconds to the first token": "first_token_seconds",
    "decode tokens/s": "decode_tokens_per_second",
    "peak memory, GiB": "peak_gib",
}


def benchmark_blocks(record: Mapping[str, Any]) -> Iterator[tables.Block]:
    """Where the figures come from, and their table."""
    settings, found = record["settings"], record["figures"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield tables.Paragraph(f"{record['hardware']}; {versions}.")
    short = (
        f"{name} {value}"
        for name, value in settings.items()
        if isinstance(value, str | int | float | list) and len(str(value)) < 60
    )
    yield tables.Paragraph(", ".join(short) + ".")
    numbers = [[name, _text(v)] for name, v in found.items() if isinstance(v, int | float)]
    if numbers:
        yield tables.Table(["figure", "value"], numbers)
    systems = _systems_of(found)
    if systems:
        yield _systems(systems)
    for name, value in found.items():
        rows = _rows(name, value)
        if rows and value is not systems:
            yield _plain(rows)


def benchmark_figures(record: Mapping[str, Any]) -> Iterator[Picture]:
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


def _plain(rows: Sequence[Mapping[str, Any]]) -> tables.Table:
    """All numbers and short texts of the rows, a column a name."""
    names = dict.fromkeys(
        name for row in rows for name, value in row.items() if isinstance(value, int | float | str)
    )
    return tables.Table(list(names), [[_text(row.get(name)) for name in names] for row in rows])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value).strip()


def _systems(results: Sequence[Mapping[str, Any]]) -> tables.Table:
    rows = sorted(results, key=lambda row: (row["length"], row["batch"], row["system"] != FULL))
    if not any(row["system"] == FULL for row in rows):
        rows.insert(0, {"system": FULL, "length": 0, "batch": 0, "status": "not in this run"})
    header = ["system", "tokens", "rows", *(heading for heading, _, _ in COLUMNS)]
    return tables.Table(header, [_system(row) for row in rows])


def _system(row: Mapping[str, Any]) -> list[str]:
    head = [row["system"], f"{row['length']:,}", str(row["batch"])]
    if row["status"] != OK:
        return [*head, row["status"], *["-"] * (len(COLUMNS) - 1)]
    return head + [
        "-" if row.get(name) is None else format(row[name], form) for _, name, form in COLUMNS
    ]


def _over_lengths(rows: Sequence[Mapping[str, Any]]) -> Any:
    figure, axes = plotting().subplots(
        1, len(SPEEDS), figsize=(4.2 * len(SPEEDS), 3.6), layout="constrained"
    )
    lines = list(dict.fromkeys((row["system"], row["batch"]) for row in rows))
    for axis, (title, name) in zip(axes, SPEEDS.items(), strict=True):
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


KINDS: dict[
    str, tuple[Callable[[Any], Iterator[tables.Block]], Callable[[Any], Iterator[Picture]]]
] = {
    "Benchmarks of quality": (tables.evaluation_blocks, evaluation_figures),
    "Speed and memory": (benchmark_blocks, benchmark_figures),
}
"""The kinds of results by title, in the order of the report: what makes the text and tables of one,
and what makes its pictures."""

Source = tuple[Path, str, Mapping[str, Any]]
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
        blocks = [tables.Heading(1, title), *_all_blocks(sources, folder)]
        (folder / MARKDOWN).write_text(tables.markdown_of(blocks), encoding="utf-8")
        (folder / PAGE).write_text(tables.html_of(blocks, folder), encoding="utf-8")
        shutil.copytree(folder, out, dirs_exist_ok=True)
    return out / PAGE


def read_source(path: Path) -> Source:
    """Read a file of results; ValueError if it cannot be read, or is no result that is known."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    kind = _kind_of(content) if isinstance(content, dict) else None
    if kind is None:
        raise ValueError(
            f"{path} holds no result that is known here; expected the JSON of `locret evaluate`, "
            f"`locret needle` or `locret grid` (format {FORMAT}), or of one of benchmarks/"
        )
    return path, kind, content


def _kind_of(content: Mapping[str, Any]) -> str | None:
    quality, speed = KINDS
    if (content.get("kind"), content.get("format")) == (KIND, FORMAT):
        return quality
    return speed if {"settings", "figures", "hardware", "versions"} <= content.keys() else None


def _all_blocks(sources: Sequence[Source], folder: Path) -> Iterator[tables.Block]:
    for kind in KINDS:
        of_kind = [(i, source) for i, source in enumerate(sources) if source[1] == kind]
        if of_kind:
            yield tables.Heading(2, kind)
        for number, source in of_kind:
            yield from _source_blocks(source, folder, number)


def _source_blocks(source: Source, folder: Path, number: int) -> Iterator[tables.Block]:
    path, kind, content = source
    blocks, figures = KINDS[kind]
    yield tables.Heading(3, content.get("name") or path.stem)
    try:
        yield from list(blocks(content))
        for name, caption, figure in figures(content):
            file = Path(FIGURES) / f"{number:02d}-{path.stem}-{name}.png"
            save_figure(figure, folder / file)
            yield tables.Figure(file, caption)
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} looks like a result of '{kind}', but is not whole ({what})"
        ) from error
    yield tables.Paragraph(f"From {path.name}.")
