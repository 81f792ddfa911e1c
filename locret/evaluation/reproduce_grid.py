"""A column of a committed needle grid, again."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from locret.evaluation import grid
from locret.evaluation.comparison import Comparison, Scores, compare
from locret.evaluation.needle import NeedleSettings
from locret.evaluation.rows import FULL
from locret.heads import RetainingHeads
from locret.models import load_model

GRID_POLICIES = (FULL, "locret")
Progress = Callable[[int, int], None]


def grid_again(
    table: str, result: Mapping[str, Any], output: Path, progress: Progress | None = None
) -> list[Comparison]:
    """The shortest column of a grid, under the full cache and the heads.

    Args:
        table: what the grid is called.
        result: a grid's record.
        output: folder for what is computed.
    """
    manifest, settings = result["manifest"], result["settings"]
    length = min(settings["lengths"])
    needle: dict[str, Any] = {k: _tuple(v) for k, v in settings["needle"].items()}
    asked = grid.GridSettings(
        lengths=(length,),
        depths=settings["depths"],
        samples_per_cell=settings["samples_per_cell"],
        needle=NeedleSettings(**needle),
    )
    policies = [p for p in GRID_POLICIES if any(cell["policy"] == p for cell in result["results"])]
    heads = RetainingHeads.from_pretrained(manifest["heads"]) if manifest["heads"] else None
    loaded = load_model(
        manifest["model"], dtype="float32", device="cpu", adapter=manifest["adapter"]
    )
    output.mkdir(parents=True, exist_ok=True)
    made = grid.run_grid(loaded, policies, asked, output / "grid.json", heads, progress=progress)[
        "results"
    ]
    before = [cell for cell in result["results"] if cell["length"] == length]
    return [
        compare(table, f"{policy} {ratio}x at {length}", [_columns((policy, ratio), before, made)])
        for policy, ratio in grid.runs_of(made)
    ]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _columns(run: tuple[str, int], *grids: Sequence[grid.Cell]) -> tuple[Scores, Scores]:
    """The answers of one run in both grids."""
    before, again = (_scores(run, cells) for cells in grids)
    return before, again


def _scores(run: tuple[str, int], cells: Sequence[grid.Cell]) -> Scores:
    own = [c for c in cells if (c["policy"], c["ratio"]) == run and c["found"] is not None]
    return {
        "samples": [f"{cell['task']} {cell['seed']}" for cell in own],
        "scores": [float(cell["found"]) for cell in own],
    }
