"""A part of a committed grid, again: a column of needles, or a budget at equal bytes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from locret.evaluation import byte_grid, grid
from locret.evaluation.comparison import Comparison, Scores, compare
from locret.evaluation.needle import NeedleSettings
from locret.evaluation.rows import FULL
from locret.heads.heads import RetainingHeads
from locret.model.loading import LoadedModel, load_model

GRID_POLICIES = (FULL, "locret")
BYTE_POLICIES = ("keydiff", "locret")
BYTE_RATIO = 32
"""The ratio of a byte grid that is asked again, if it is there; else the smallest."""
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
    loaded, heads = _loaded(manifest)
    output.mkdir(parents=True, exist_ok=True)
    made = grid.run_grid(loaded, policies, asked, output / "grid.json", heads, progress=progress)[
        "results"
    ]
    before = [cell for cell in result["results"] if cell["length"] == length]
    return [
        compare(
            table, f"{run[0]} {run[1]}x at {length}", [(_scores(run, before), _scores(run, made))]
        )
        for run in grid.runs_of(made)
    ]


def byte_grid_again(
    table: str, result: Mapping[str, Any], output: Path, progress: Progress | None = None
) -> list[Comparison]:
    """The first sample of each task at one budget, under two policies, in the most and the fewest
    bits. Arguments as those of `grid_again`."""
    settings = result["settings"]
    needle: dict[str, Any] = {k: _tuple(v) for k, v in settings["needle"].items()}
    ratios = needle["ratios"]
    ratio = BYTE_RATIO if BYTE_RATIO in ratios else min(ratios)
    bits = (max(settings["bits"]), min(settings["bits"]))
    names = ("quantization", "group", "residual", "query_aware")
    asked = byte_grid.ByteGridSettings(
        needle=NeedleSettings(**needle | {"ratios": (ratio,), "count": 1}),
        bits=tuple(dict.fromkeys(bits)),
        **{name: settings[name] for name in names},
    )
    before = [cell for cell in result["results"] if cell["ratio"] == ratio]
    there = list(dict.fromkeys(cell["policy"] for cell in before))
    policies = [policy for policy in there if policy in BYTE_POLICIES] or there
    loaded, heads = _loaded(result["manifest"])
    output.mkdir(parents=True, exist_ok=True)
    made = byte_grid.run_byte_grid(
        loaded, policies, asked, output / "grid.json", heads, progress=progress
    )["results"]
    return [
        compare(
            table,
            f"{run.policy} {run.ratio}x in {run.bits} bits",
            [(_scores(run, before), _scores(run, made))],
        )
        for run in byte_grid.runs(policies, asked)
    ]


def _loaded(manifest: Mapping[str, Any]) -> tuple[LoadedModel, RetainingHeads | None]:
    """The grid's model on the CPU, in float32, and its heads."""
    heads = RetainingHeads.from_pretrained(manifest["heads"]) if manifest["heads"] else None
    loaded = load_model(
        manifest["model"], dtype="float32", device="cpu", adapter=manifest["adapter"]
    )
    return loaded, heads


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _scores(run: tuple[str, int] | byte_grid.ByteRun, cells: Sequence[Mapping[str, Any]]) -> Scores:
    """The answers of one run."""
    names = ("policy", "ratio", "bits")[: len(run)]
    own = [c for c in cells if tuple(c[n] for n in names) == tuple(run) and c["found"] is not None]
    return {
        "samples": [f"{cell['task']} {cell['seed']}" for cell in own],
        "scores": [float(cell["found"]) for cell in own],
    }
