"""Pictures of results: quality against budget and bytes, maps of needles by length and depth.

Matplotlib is loaded only by those who draw.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from locret.evaluation.config import FULL, in_words
from locret.evaluation.tables import MIB, Result, budget_text, cells_of, full_of
from locret.system.files import check_file


def plotting() -> Any:
    """`matplotlib.pyplot` without a screen; ValueError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures need the package matplotlib: pip install 'locret[eval]'")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check(path: Path) -> None:
    """Refuse a figure that could not be drawn in the end (ValueError): matplotlib is not installed,
    it is no such file, or it is a folder."""
    plotting()
    kinds = ("jpg", "pdf", "png", "svg")
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{str(path)!r}: a figure's name ends in one of {', '.join(kinds)}")
    check_file(path, "the figure")


def save(figure: Any, path: Path) -> Path:
    """Write a figure in the format that the path's ending names, and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plotting().close(figure)
    return path


def figures(result: Result) -> Iterator[tuple[str, str, Any]]:
    """Name, caption and matplotlib figure of each picture of an evaluation."""
    bounded = [setup for setup in answered(result) if setup["setup"] != FULL]
    if any(setup["quantization"] is None for setup in bounded):
        caption = "Quality against budget: mean score over tasks, 95 % intervals"
        yield "budget", caption, against(result, bytes=False)
    if any(setup["quantization"] is not None for setup in answered(result)):
        caption = "Quality against bytes: mean score over tasks, 95 % intervals"
        yield "bytes", caption, against_bytes(result)
    if len({cell["length"] for cell in _placed(result["cells"])}) > 1:
        yield "needles", "Share of needles found by length and depth", needle_map(result)


def answered(result: Result) -> list[Mapping[str, Any]]:
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
        for setup in answered(result)
        if setup["setup"] != FULL and (bytes or setup["quantization"] is None)
    ]
    key, unit = ("bytes", MIB) if bytes else ("units", 1)
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

PANELS = 4  # in a line


def _placed(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The cells of tasks whose samples have a depth."""
    return [cell for cell in cells if "depths" in cell]


def needle_map(result: Result) -> Any:
    """A panel for each setup: length across, depth down; grey where nothing was answered."""
    setups = result["setups"]
    lengths = sorted({cell["length"] for cell in _placed(result["cells"])})
    across = min(PANELS, len(setups))
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
    budget = "" if setup["budget"] is None else f", {budget_text(setup)}"
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
