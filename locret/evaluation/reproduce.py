"""`python -m locret reproduce`: run a small slice of committed results again, and compare.

    python -m locret reproduce docs/results --data-dir data

Of every result file of an evaluation the slice that its configuration calls `smoke` is run from
scratch, on the same samples. A row is reproduced if its mean over the slice lies within what so
many draws of the committed scores give (95 %). Of a needle grid the shortest column is asked again,
of a grid at equal bytes one sample of each task. Tasks whose data is not here are left out, and
said.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from locret.evaluation import byte_grid, evaluate, grid
from locret.evaluation.comparison import Comparison, compare
from locret.evaluation.config import EvalConfig, overridden
from locret.evaluation.evaluate import Progress
from locret.evaluation.reproduce_grid import byte_grid_again, grid_again
from locret.tasks import task_names

GRIDS = {grid.KIND: grid_again, byte_grid.KIND: byte_grid_again}
ON_A_CPU = {"device": "cpu", "dtype": "float32", "batch_size": 1}


@dataclass(frozen=True)
class Reproduction:
    """What was run again, and what was not for which reason."""

    compared: tuple[Comparison, ...]
    left_out: tuple[str, ...]

    @property
    def reproduced(self) -> bool:
        return bool(self.compared) and all(row.reproduced for row in self.compared)


def result_files(places: Sequence[Path]) -> list[Path]:
    """JSON files that can be run again, of files and folders.

    Raises:
        ValueError: there are none.
    """
    files = [path for place in places for path in (_within(place))]
    found = [path for path in files if _kind(path) in ("evaluation", *GRIDS)]
    if not found:
        raise ValueError(
            f"{', '.join(map(str, places))}: no results of `evaluate` or of a grid there"
        )
    return found


def _within(place: Path) -> list[Path]:
    return sorted(place.glob("*.json")) if place.is_dir() else [place]


def _kind(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("kind") if isinstance(found, dict) else None


def reproduce(
    path: Path, output: Path, changes: Mapping[str, Any], progress: Progress | None = None
) -> Reproduction:
    """Run the slice of one file again.

    Args:
        output: folder for what is computed.
        changes: of the configuration, such as `data_dir`.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["kind"] in GRIDS:
        return Reproduction(tuple(GRIDS[result["kind"]](path.stem, result, output, progress)), ())
    config = _slice(result["manifest"]["config"], {**changes, "output": str(output)})
    config, left_out = _with_data(config)
    if not config.tasks:
        return Reproduction((), left_out)
    made = evaluate.run(config, "python -m locret reproduce", progress=progress)
    assert made is not None
    again = json.loads(made.read_text(encoding="utf-8"))
    return Reproduction(tuple(_compared(path.stem, result, again)), left_out)


def _slice(config: Mapping[str, Any], changes: Mapping[str, Any]) -> EvalConfig:
    smoke = {"limit": 1} | dict(config.get("smoke") or {})
    return EvalConfig.from_dict(overridden(config, {**smoke, **ON_A_CPU, **changes}))


def _with_data(config: EvalConfig) -> tuple[EvalConfig, tuple[str, ...]]:
    """Without the tasks whose data is not here, and why."""
    here, left_out = [], []
    for name in task_names(config.tasks):
        try:
            replace(config, tasks=(name,)).make_tasks()
        except ValueError as error:
            left_out.append(f"{name}: {error}")
        else:
            here.append(name)
    return replace(config, tasks=tuple(here)), tuple(left_out)


def _compared(
    table: str, committed: Mapping[str, Any], again: Mapping[str, Any]
) -> Iterator[Comparison]:
    before = {(cell["row"], cell["task"]): cell for cell in committed["cells"]}
    for row in dict.fromkeys(cell["row"] for cell in again["cells"]):
        pairs = [
            (before[row, cell["task"]], cell)
            for cell in again["cells"]
            if cell["row"] == row and (row, cell["task"]) in before
        ]
        if pairs:
            yield compare(table, row, pairs)
