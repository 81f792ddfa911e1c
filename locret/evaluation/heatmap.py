"""Heat maps of needle grids: length across, depth down, one panel a policy and ratio."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locret.evaluation import grid

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
    return made


def _panel(axis: Any, record: dict[str, Any], run: tuple[str, int]) -> Any:
    settings = record["settings"]
    lengths, depths = settings["lengths"], settings["depths"]
    found = grid.shares(record["results"], *run)
    values = [[_value(found.get((length, row))) for length in lengths] for row in range(depths)]
    axis.set_facecolor("lightgrey")
    image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    policy, ratio = run
    axis.set_title(policy if ratio == 1 else f"{policy}, {ratio}x fewer units", fontsize=10)
    axis.set_xticks(range(len(lengths)), [_thousands(n) for n in lengths], fontsize=8)
    axis.set_yticks(range(depths), _depth_labels(depths), fontsize=8)
    axis.set_xlabel("tokens", fontsize=8)
    return image


def _value(share: float | None) -> float:
    return float("nan") if share is None else share


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _depth_labels(depths: int) -> Sequence[str]:
    return [f"{(row + 0.5) / depths:.0%}" for row in range(depths)]
