"""From predictions to figures: one JSON for a run.

The JSON holds

    kind, format, name    "evaluation", 2, the output folder's name
    manifest              where the figures come from (`locret.evaluation.records`)
    cells                 one for a setup and task: scores, their interval, units and bytes, ...
    setups                one for a setup: the mean over tasks

Scores are 0 to 1. A sample that did not fit into the device's memory has the score None, counts in
`failed`, and in no mean. Intervals are 95 %: Wilson's of a share found, else
bootstrapped; samples about one context are drawn together. `difference` is to the full cache on
the same samples, `share` is of its score, each with its own interval, samples drawn in pairs; there
is no share where the full cache finds too little. `others` holds the same figures of other metrics
than a task's main one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from locret.evaluation.config import FULL, in_words
from locret.evaluation.questions import Question
from locret.evaluation.records import OUT_OF_MEMORY, Record

KIND = "evaluation"
FORMAT = 2
FOUND = "found"
"""The metric of a share found: samples with contexts of their own, scores of 0 and 1."""

Answered = tuple[Question, Record]
Scores = Mapping[str, Sequence[float | None]]


def figures(answered: Sequence[Answered]) -> dict[str, Any]:
    """Cells and setups of the table, of every question of the run with its record, in its order."""
    by_cell: dict[tuple[str, str], list[Answered]] = {}
    for question, record in answered:
        key = (question.setup.label, question.task.label)
        by_cell.setdefault(key, []).append((question, record))
    scored = {cell: _scores(those) for cell, those in by_cell.items()}
    cells = [
        _cell(those, scored[cell], scored.get((FULL, cell[1]))) for cell, those in by_cell.items()
    ]
    groups = {cell: [question.group for question, _ in those] for cell, those in by_cell.items()}
    labels = list(dict.fromkeys(setup for setup, _ in by_cell))
    return {"cells": cells, "setups": [_setup(label, cells, groups) for label in labels]}


def _scores(answered: Sequence[Answered]) -> dict[str, list[float | None]]:
    """Scores of the samples, in order, by metric."""
    metrics = answered[0][0].task.metrics
    each = [
        dict.fromkeys(metrics)
        if record.end == OUT_OF_MEMORY
        else question.task.score(question.sample, record.answer)
        for question, record in answered
    ]
    return {metric: [scores[metric] for scores in each] for metric in metrics}


def _cell(answered: Sequence[Answered], scores: Scores, of_full: Scores | None) -> dict[str, Any]:
    question, _ = answered[0]
    records = [record for _, record in answered]
    task, setup = question.task, question.setup
    main = task.metrics[0]
    depths = [q.sample.depth for q, _ in answered]
    against = None if setup.label == FULL else of_full
    groups = [q.group for q, _ in answered]
    by_metric = {
        metric: _figures({"": values}, against and {"": against[metric]}, {"": groups}, metric)
        for metric, values in scores.items()
    }
    others = {
        metric: by_metric[metric] | {"scores": _rounded(values)}
        for metric, values in scores.items()
        if metric != main and main != FOUND  # needles are counted
    }
    return {
        "setup": setup.label,
        "task": task.label,
        "policy": setup.policy,
        "name": setup.name or setup.policy,
        "budget": None if setup.keeps_all else setup.budget,
        "protocol": "any" if setup.keeps_all else setup.protocol,
        "quantization": setup.quantization,
        "task_name": task.name,
        "length": task.length,
        "metric": main,
        **by_metric[main],
        "count": len(records),
        "failed": sum(record.end == OUT_OF_MEMORY for record in records),
        "other_metrics": {m: found["score"] for m, found in by_metric.items() if m != main},
        **({"others": others} if others else {}),
        **_sizes([record for record in records if record.end != OUT_OF_MEMORY]),
        "cut": sum(record.cut > 0 for record in records),
        "answer_cut": sum(record.answer_cut for record in records),
        "ends": {
            e: sum(r.end == e for r in records) for e in ("eos", "stop", "length", OUT_OF_MEMORY)
        },
        "samples": [q.sample.id for q, _ in answered],
        **({} if None in depths else {"depths": depths}),
        "scores": _rounded(scores[main]),
    }


def _rounded(scores: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 6) for value in scores]


def _figures(
    scores: Scores, of_full: Scores | None, groups: Mapping[str, Sequence[str]], metric: str
) -> dict[str, Any]:
    """`score` and `interval` of the mean over tasks, None where nothing was answered; what it is
    beside the full cache, if that was asked."""
    answered, of_answered = _answered(scores, groups)
    if not answered:
        return {"score": None, "interval": None}
    score, spread = average_of_tasks(answered, of_answered)
    counts = {len(values) for values in answered.values()}
    if metric == FOUND and len(counts) == 1:  # the mean is the share of all samples
        every = [value for values in answered.values() for value in values]
        spread = wilson(sum(value == 1.0 for value in every), len(every))
    found = {"score": score, "interval": spread}
    return found if of_full is None else found | _beside_full(scores, of_full, groups)


def _beside_full(
    scores: Scores, of_full: Scores, groups: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Difference to the full cache and share of its score, over the samples that both answered."""
    own, full, of_own = _answered(scores, of_full, groups)
    if not own:
        return {}
    change = {
        task: [a - b for a, b in zip(values, full[task], strict=True)]
        for task, values in own.items()
    }
    mean, spread = average_of_tasks(change, of_own)
    share = share_of_means(own, full, of_own)
    return {
        "difference": mean,
        "difference_interval": spread,
        **({} if share is None else {"share": share[0], "share_interval": share[1]}),
    }


def _answered(*columns: Mapping[str, Sequence[Any]]) -> tuple[dict[str, list[Any]], ...]:
    """The same columns by task, without the samples that lack a value in one of them, and without
    tasks that have no others."""
    rows = {
        task: [r for r in zip(*(column[task] for column in columns), strict=True) if None not in r]
        for task in columns[0]
    }
    return tuple(
        {task: [row[i] for row in those] for task, those in rows.items() if those}
        for i in range(len(columns))
    )


SIZES = ("units", "bytes", "bytes_after", "full_cache_bytes")


def _sizes(records: Sequence[Record]) -> dict[str, Any]:
    """Prompts, budgets, units and bytes: means and the largest; None where there is no answer."""
    return {
        "prompt_tokens": _spread([record.prompt_tokens for record in records]),
        "compressed_tokens": _spread([record.compressed_tokens for record in records]),
        "rest_tokens": _spread(
            [r.prompt_tokens - r.compressed_tokens + r.new_tokens for r in records]
        ),
        "units_allowed": _spread([r.budget for r in records if r.budget is not None]),
        "units": _units(records),
        "bytes": _spread([record.bytes for record in records]),
        "room_bytes": _spread([record.room_bytes for record in records]),
        "bytes_after": _spread([record.bytes_after for record in records]),
        "full_cache_bytes": _spread([record.full_bytes for record in records]),
        "seconds": round(sum(record.seconds for record in records), 2),
    }


def _units(records: Sequence[Record]) -> dict[str, float] | None:
    """Units that a head holds on average; where heads differ, those that hold fewest and most."""
    if not records:
        return None
    means, largest = zip(*(record.units for record in records), strict=True)
    heads = [record.head_units for record in records if record.head_units]
    spread = {"fewest": min(x for x, _ in heads), "most": max(x for _, x in heads)} if heads else {}
    return {"mean": _mean(means), "max": max(largest), **spread}


def _setup(
    label: str, cells: Sequence[Mapping[str, Any]], all_groups: Mapping[tuple[str, str], list[str]]
) -> dict[str, Any]:
    own = [cell for cell in cells if cell["setup"] == label]
    groups = {cell["task"]: all_groups[label, cell["task"]] for cell in own}
    scores = {cell["task"]: cell["scores"] for cell in own}
    full = {cell["task"]: cell["scores"] for cell in cells if cell["setup"] == FULL}
    against = full if label != FULL and set(full) >= set(scores) else None
    metrics = {cell["metric"] for cell in own}
    return {
        "setup": label,
        **{key: own[0][key] for key in ("policy", "name", "budget", "protocol", "quantization")},
        "tasks": len(own),
        **_figures(scores, against, groups, metrics.pop() if len(metrics) == 1 else ""),
        **{key: _over_tasks([cell[key] for cell in own]) for key in SIZES},
        **{key: sum(c[key] for c in own) for key in ("count", "failed", "cut", "answer_cut")},
        "seconds": round(sum(cell["seconds"] for cell in own), 2),
    }


def _over_tasks(spreads: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    there = [spread for spread in spreads if spread is not None]
    if not there:
        return None
    fewest = [spread["fewest"] for spread in there if "fewest" in spread]
    most = [spread["most"] for spread in there if "most" in spread]
    return {
        "mean": _mean([spread["mean"] for spread in there]),
        "max": max(spread["max"] for spread in there),
        **({"fewest": min(fewest), "most": max(most)} if fewest else {}),
    }


def _mean(numbers: Sequence[float]) -> float:
    return round(sum(numbers) / len(numbers), 1)


def _spread(numbers: Sequence[int]) -> dict[str, float] | None:
    return {"mean": _mean(numbers), "max": max(numbers)} if numbers else None


# ---- reading a result ----------------------------------------------------------------------------

Result = Mapping[str, Any]
"""What the JSON holds."""
Part = Mapping[str, Any]
"""A setup or a cell of it."""


def tasks_of(result: Result) -> list[str]:
    """Labels of the tasks, in the order of the table."""
    return list(dict.fromkeys(cell["task"] for cell in result["cells"]))


def cells_of(result: Result, setup: Part) -> list[Part]:
    """The cells of a setup, one for each task."""
    return [cell for cell in result["cells"] if cell["setup"] == setup["setup"]]


def others_of(result: Result, task: str) -> list[str]:
    """Names of the scores of a task beside its main one, where the result tells their figures."""
    cell = next(cell for cell in result["cells"] if cell["task"] == task)
    return list(cell.get("others", {}))


def has_shares(result: Result) -> bool:
    """Whether a setup tells its share of the full cache's score: old results do not."""
    return any("share" in setup for setup in result["setups"])


def full_of(result: Result) -> Part | None:
    """The setup of the full cache, if it was asked."""
    return next((setup for setup in result["setups"] if setup["setup"] == FULL), None)


def stored_name(setup: Part) -> str:
    """The policy, and how keys and values are stored, if not as they are."""
    stored = f" {in_words(setup['quantization'])}" if setup["quantization"] else ""
    return f"{setup['name']}{stored}"


class Line:
    """What a setup found over all its samples, and the most tokens, units and bytes of one.

    `of_full`: found among those that the full cache finds. `real`: bytes of the full cache for one
    byte of this one; without the full cache, bytes of its keys and values. `units`: of a head on
    average. `heads`: of the head that holds fewest, and most; empty where all hold equally many.
    """

    def __init__(
        self,
        setup: Part,
        cells: Sequence[Part],
        of_full: Sequence[Part] | None,
    ) -> None:
        def most(name: str, of: Sequence[Part] = cells) -> float:
            return max(cell[name]["max"] for cell in of)

        def context(of: Sequence[Part] = cells) -> float:
            return most("bytes", of) - most("room_bytes", of)

        aware = ", query-aware" if setup["protocol"] == "query_aware" else ""
        self.name = f"{stored_name(setup)}{aware}"
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
    of_full = None if full is None else _with_answers(result, full)
    answered = ((setup, _with_answers(result, setup)) for setup in result["setups"])
    return [Line(setup, cells, of_full) for setup, cells in answered if cells]


def _with_answers(result: Result, setup: Part) -> list[Part]:
    """The cells of a setup that have an answer."""
    return [cell for cell in cells_of(result, setup) if cell["units"] is not None]


def _found(cells: Sequence[Part]) -> set[tuple[str, str]]:
    """Task and sample of everything that was found."""
    return {
        (cell["task"], sample)
        for cell in cells
        for sample, score in zip(cell["samples"], cell["scores"], strict=True)
        if score == 1.0
    }


# ---- intervals -----------------------------------------------------------------------------------

RESAMPLES = 2000
LEVEL = 0.95
Z = 1.959964  # standard deviations of a normal distribution that hold 95 %


def resampled_means(
    values: Sequence[float],
    groups: Sequence[str] | None = None,
    seed: int = 0,
    count: int | None = None,
) -> Tensor:
    """Means of `count` draws from scores (None = as many as there are), [RESAMPLES] float64.
    Samples of one group are drawn together: questions about one text are no independent draws.
    None = each sample is drawn on its own."""
    scores = torch.tensor(values, dtype=torch.float64)
    if groups is None:
        sums, sizes = scores, torch.ones_like(scores)
    else:
        order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        index = torch.tensor([order[group] for group in groups])
        sums = torch.zeros(len(order), dtype=torch.float64).index_add(0, index, scores)
        sizes = torch.bincount(index, minlength=len(order)).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(sums), (RESAMPLES, count or len(sums)), generator=generator)
    return sums[drawn].sum(1) / sizes[drawn].sum(1)


def interval(means: Tensor) -> tuple[float, float]:
    """The middle `LEVEL` of resampled means."""
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype))
    return float(low), float(high)


Groups = Mapping[str, Sequence[str]] | None


def average_of_tasks(
    scores: Mapping[str, Sequence[float]], groups: Groups = None
) -> tuple[float, tuple[float, float]]:
    """Mean over tasks of their mean score, and its interval: samples are drawn within tasks."""
    return _mean_of_means(scores), interval(_draws(scores, groups))


def share_of_means(
    scores: Mapping[str, Sequence[float]], of: Mapping[str, Sequence[float]], groups: Groups = None
) -> tuple[float, tuple[float, float]] | None:
    """The mean over tasks as a share of another one on the same samples, and its interval: every
    draw takes the same samples of both. None where a draw of the other finds nothing."""
    whole = _draws(of, groups)
    if not bool((whole > 0).all()):
        return None
    share = _mean_of_means(scores) / _mean_of_means(of)
    return share, interval(_draws(scores, groups) / whole)


def _mean_of_means(scores: Mapping[str, Sequence[float]]) -> float:
    return sum(sum(values) / len(values) for values in scores.values()) / len(scores)


def _draws(scores: Mapping[str, Sequence[float]], groups: Groups) -> Tensor:
    """Means over tasks of resamples, [RESAMPLES] float64; of any scores of these samples, the same
    samples."""
    draws = [
        resampled_means(values, groups[task] if groups else None, seed)
        for seed, (task, values) in enumerate(scores.items())
    ]
    return torch.stack(draws).mean(0)


def wilson(found: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), which has a width at 0 and 1 too."""
    share, square = found / count, Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    half *= Z / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)
