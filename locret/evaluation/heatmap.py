"""Heat maps of needle grids: length across, depth down, one panel a policy and ratio."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locret.evaluation import grid, local_needles

COLUMNS = 4  # panels in a row


def draw(record: dict[str, Any], path: Path) -> Path:
    """Write the figure of a grid's JSON; empty cells (nothing ran) are grey.

    Raises:
        ValueError: matplotlib is not installed, or the record holds no results.
    """
    from locret.evaluation.figures import save

    return save(figure(record), path)


def figure(record: dict[str, Any]) -> Any:
    """The matplotlib figure of a grid's JSON."""
    from locret.evaluation.figures import plotting

    runs = grid.runs_of(record["results"])
    if not runs:
        raise ValueError("the needle grid holds no results yet; run it first")
    across = min(COLUMNS, len(runs))
    down = -(-len(runs) // across)
    made, axes = plotting().subplots(
        down,
        across,
        figsize=(3.4 * across + 1, 3.0 * down + 0.4),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for place, axis in enumerate(axes.flat):
        if place < len(runs):
            image = _panel(axis, record, runs[place])
        else:
            axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("depth of the needle", fontsize=8)
    made.colorbar(image, ax=axes, label="share found", shrink=0.8)
    said = local_needles.notes(record["results"], grid.local_tokens_of(record))
    if said:
        lines = [textwrap.fill(line, 45 * across) for line in said]
        made.supxlabel("\n".join(lines), fontsize=7, x=0.01, ha="left")
    return made


def _panel(axis: Any, record: dict[str, Any], run: tuple[str, int]) -> Any:
    settings = record["settings"]
    lengths, depths = settings["lengths"], settings["depths"]
    found = grid.shares(record["results"], *run)
    values = [[_value(found.get((length, row))) for length in lengths] for row in range(depths)]
    axis.set_facecolor("lightgrey")
    _mark_local_needles(axis, record)
    image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    policy, ratio = run
    budget = "" if ratio == 1 else f", budget 1/{ratio} of the prompt"
    axis.set_title(f"{policy}{budget}", fontsize=9)
    axis.set_xticks(range(len(lengths)), [_thousands(n) for n in lengths], fontsize=8)
    axis.set_yticks(range(depths), _depth_labels(depths), fontsize=8)
    axis.set_xlabel("tokens", fontsize=8)
    return image


def _mark_local_needles(axis: Any, record: dict[str, Any]) -> None:
    """Cells that say nothing about the policy."""
    lengths = record["settings"]["lengths"]
    for length, row in grid.places_with_local_needles(record["results"]):
        place = lengths.index(length), row
        axis.text(*place, local_needles.MARK, color="red", ha="center", va="center", fontsize=14)


def _value(share: float | None) -> float:
    return float("nan") if share is None else share


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _depth_labels(depths: int) -> Sequence[str]:
    return [f"{(row + 0.5) / depths:.0%}" for row in range(depths)]
