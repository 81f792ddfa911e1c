"""`python -m locret reproduce`: run a small slice of committed results again, and compare.

    python -m locret reproduce docs/results --data-dir data

Of every result of an evaluation the slice that its configuration calls `smoke` is run from scratch,
on the same samples. A setup is reproduced if its mean over the slice lies within what so many draws
of the committed scores give (95 %). Tasks whose data is not here are left out, and said.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from locret.evaluation import evaluate
from locret.evaluation.config import EvalConfig
from locret.evaluation.evaluate import Progress
from locret.evaluation.results import FORMAT, KIND, RESAMPLES, interval
from locret.tasks import task_names

ON_A_CPU = {"device": "cpu", "dtype": "float32", "batch_size": 1}

Scores = Mapping[str, Any]
"""`samples`, their ids, and `scores`, one each."""


@dataclass(frozen=True)
class Comparison:
    """A setup of a table, again.

    Attributes:
        table, setup: which.
        count: samples of the slice.
        committed: their mean in the file; again: their mean now.
        low, high: where the mean of so many samples may lie by the committed figures.
        equal: samples with the very same score.
    """

    table: str
    setup: str
    count: int
    committed: float
    again: float
    low: float
    high: float
    equal: int

    @property
    def reproduced(self) -> bool:
        return self.low <= self.again <= self.high


def compare(table: str, setup: str, pairs: Sequence[tuple[Scores, Scores]]) -> Comparison:
    """A setup of a table, again. `pairs` are for every task the committed scores, and those of the
    slice; samples that were not committed are left out, and a task with no others is a
    ValueError."""
    same, now, draws = [], [], []
    equal = count = 0
    for seed, (old, new) in enumerate(pairs):
        by_sample = dict(zip(old["samples"], old["scores"], strict=True))
        asked = zip(new["samples"], new["scores"], strict=True)
        known = [(by_sample[sample], score) for sample, score in asked if sample in by_sample]
        known = [(a, b) for a, b in known if a is not None and b is not None]
        if not known:
            raise ValueError(f"{table}, {setup}: none of the samples asked was committed")
        count += len(known)
        same.append(sum(a for a, _ in known) / len(known))
        now.append(sum(b for _, b in known) / len(known))
        equal += sum(abs(a - b) < 1e-6 for a, b in known)
        answered = [score for score in old["scores"] if score is not None]
        draws.append(drawn_means(answered, len(known), seed))
    low, high = interval(torch.stack(draws).mean(0))
    return Comparison(table, setup, count, _mean(same), _mean(now), low, high, equal)


def drawn_means(scores: Sequence[float], count: int, seed: int = 0) -> torch.Tensor:
    """Means of `count` draws from the scores, [RESAMPLES] float64."""
    values = torch.tensor(scores, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), (RESAMPLES, count), generator=generator)].mean(1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def as_table(compared: Sequence[Comparison]) -> str:
    """A line a setup, in per cent."""
    wide = max([36, *(len(one.setup) + 2 for one in compared)])
    head = (
        f"{'table':<24}{'setup':<{wide}}{'samples':>8}{'committed':>11}{'again':>8}{'allowed':>14}"
    )
    lines = [head]
    for one in compared:
        allowed = f"{100 * one.low:.1f}-{100 * one.high:.1f}"
        lines.append(
            f"{one.table:<24}{one.setup:<{wide}}{one.count:>8}{100 * one.committed:>11.1f}"
            f"{100 * one.again:>8.1f}{allowed:>14}  "
            + ("reproduced" if one.reproduced else "NOT reproduced")
            + f", {one.equal} of {one.count} alike"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Reproduction:
    """What was run again, and what was not for which reason."""

    compared: tuple[Comparison, ...]
    left_out: tuple[str, ...]

    @property
    def reproduced(self) -> bool:
        return bool(self.compared) and all(setup.reproduced for setup in self.compared)


def result_files(places: Sequence[Path]) -> list[Path]:
    """JSON files that can be run again, of files and folders; ValueError if there are none."""
    files = [sorted(place.glob("*.json")) if place.is_dir() else [place] for place in places]
    found = [path for those in files for path in those if _is_evaluation(path)]
    if not found:
        raise ValueError(f"{', '.join(map(str, places))}: no results of `evaluate` there")
    return found


def _is_evaluation(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = isinstance(found, dict) and found.get("kind") == KIND
    if named and found.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {found.get('format')}; expected {FORMAT}: ask again, with "
            "`python -m locret evaluate`"
        )
    return named


def reproduce(
    path: Path, output: Path, changes: Mapping[str, Any], progress: Progress | None = None
) -> Reproduction:
    """Run the slice of one file again, in the folder `output`, with changes of the configuration,
    such as `data_dir`."""
    result = json.loads(path.read_text(encoding="utf-8"))
    values = result["manifest"]["config"]
    values = {**values, "limit": 1, **(values.get("smoke") or {}), **ON_A_CPU, **changes}
    config = EvalConfig.from_dict({**values, "output": str(output)})
    here, left_out = _with_data(config)
    if not here:
        return Reproduction((), left_out)
    config = replace(config, tasks=here)
    asked = _labels(config)
    if not asked & {(cell["setup"], cell["task"]) for cell in result["cells"]}:
        slice_of = ", ".join(sorted({task for _, task in asked}))
        return Reproduction((), (*left_out, f"its slice ({slice_of}) is not among its results"))
    made = evaluate.run(config, "python -m locret reproduce", progress=progress)
    assert made is not None
    again = json.loads(made.read_text(encoding="utf-8"))
    return Reproduction(tuple(_compared(name_of(path), result, again)), left_out)


def _labels(config: EvalConfig) -> set[tuple[str, str]]:
    """Setups and tasks that a configuration asks."""
    tasks = [task.label for task in config.make_tasks()]
    return {(setup.label, task) for setup in config.all_setups() for task in tasks}


def name_of(path: Path) -> str:
    """What a result is called: by its file, or its folder, if the file is `evaluate`'s own."""
    return path.resolve().parent.name if path.name == evaluate.RESULT else path.stem


def _with_data(config: EvalConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tasks whose data is here, and why the others are left out."""
    here, left_out = [], []
    for name in task_names(tuple(config.tasks)):
        try:
            replace(config, tasks=(name,)).make_tasks()
        except ValueError as error:
            left_out.append(f"{name}: {error}")
        else:
            here.append(name)
    return tuple(here), tuple(left_out)


def _compared(
    table: str, committed: Mapping[str, Any], again: Mapping[str, Any]
) -> Iterator[Comparison]:
    before = {(cell["setup"], cell["task"]): cell for cell in committed["cells"]}
    for setup in dict.fromkeys(cell["setup"] for cell in again["cells"]):
        pairs = [
            (before[setup, cell["task"]], cell)
            for cell in again["cells"]
            if cell["setup"] == setup and (setup, cell["task"]) in before
        ]
        if pairs:
            yield compare(table, setup, pairs)
