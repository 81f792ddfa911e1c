"""From predictions to figures: one JSON for a run, and the table of it.

The JSON holds

    kind, format, name    "evaluation", 1, the output folder's name
    manifest              where the figures come from (`locret.evaluation.manifest`)
    cells                 one for a row and task: scores, their interval, units and bytes held, ...
    rows                  one for a row: the mean over tasks

Scores are 0 to 1. Intervals are 95 % bootstrap intervals; samples about one context are drawn
together. `difference` is to the full cache on the same samples, with its own interval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from locret.evaluation.bootstrap import average_of_tasks
from locret.evaluation.questions import Question
from locret.evaluation.records import Record
from locret.evaluation.rows import FULL

FORMAT = 1
Answered = tuple[Question, Record]


def figures(answered: Sequence[Answered]) -> dict[str, Any]:
    """Cells and rows of the table.

    Args:
        answered: every question of the run with its record, in the order of the table.
    """
    by_cell: dict[tuple[str, str], list[Answered]] = {}
    for question, record in answered:
        by_cell.setdefault((question.row.label, question.task.label), []).append((question, record))
    scored = {cell: _scores(those) for cell, those in by_cell.items()}
    cells = [
        _cell(those, scored[cell], scored.get((FULL, cell[1]))) for cell, those in by_cell.items()
    ]
    groups = {cell: [question.group for question, _ in those] for cell, those in by_cell.items()}
    labels = list(dict.fromkeys(row for row, _ in by_cell))
    return {"cells": cells, "rows": [_row(label, cells, groups) for label in labels]}


def _scores(answered: Sequence[Answered]) -> dict[str, list[float]]:
    """Scores of the samples, in order, by metric."""
    each = [q.task.score(q.sample, record.answer) for q, record in answered]
    return {metric: [scores[metric] for scores in each] for metric in answered[0][0].task.metrics}


def _cell(
    answered: Sequence[Answered],
    scores: Mapping[str, Sequence[float]],
    of_full: Mapping[str, Sequence[float]] | None,
) -> dict[str, Any]:
    question, _ = answered[0]
    records = [record for _, record in answered]
    task, row = question.task, question.row
    main = task.metrics[0]
    groups = {main: [q.group for q, _ in answered]}
    score, spread = average_of_tasks({main: scores[main]}, groups)
    cell = {
        "row": row.label,
        "task": task.label,
        **_identity(question),
        "task_name": task.name,
        "length": task.length,
        "metric": main,
        "score": score,
        "interval": spread,
        "count": len(records),
        "other_metrics": {m: sum(v) / len(v) for m, v in scores.items() if m != main},
        **_held(records),
        "cut": sum(record.cut > 0 for record in records),
        "answer_cut": sum(record.answer_cut for record in records),
        "ends": {e: sum(r.end == e for r in records) for e in ("eos", "stop", "length")},
        "samples": [q.sample.id for q, _ in answered],
        "scores": [round(value, 6) for value in scores[main]],
    }
    if of_full is not None and row.label != FULL:
        change = [a - b for a, b in zip(scores[main], of_full[main], strict=True)]
        mean, spread = average_of_tasks({main: change}, groups)
        cell |= {"difference": mean, "difference_interval": spread}
    return cell


def _identity(question: Question) -> dict[str, Any]:
    row = question.row
    return {
        "policy": row.policy,
        "name": row.name or row.policy,
        "budget": row.budget,
        "protocol": "any" if row.keeps_all else row.protocol,
        "quantization": row.quantization,
    }


def _held(records: Sequence[Record]) -> dict[str, Any]:
    """Prompts, budgets, units and bytes: means and the largest."""
    return {
        "prompt_tokens": _spread([record.prompt_tokens for record in records]),
        "compressed_tokens": _spread([record.compressed_tokens for record in records]),
        "units_allowed": _spread([r.budget for r in records if r.budget is not None]),
        "units": {
            "mean": _mean([record.units[0] for record in records]),
            "max": max(record.units[1] for record in records),
        },
        "bytes": _spread([record.bytes for record in records]),
        "bytes_after": _spread([record.bytes_after for record in records]),
        "full_cache_bytes": _spread([record.full_bytes for record in records]),
        "seconds": round(sum(record.seconds for record in records), 2),
    }


def _row(
    label: str, cells: Sequence[Mapping[str, Any]], all_groups: Mapping[tuple[str, str], list[str]]
) -> dict[str, Any]:
    own = [cell for cell in cells if cell["row"] == label]
    groups = {cell["task"]: all_groups[label, cell["task"]] for cell in own}
    scores = {cell["task"]: cell["scores"] for cell in own}
    score, spread = average_of_tasks(scores, groups)
    row = {
        "row": label,
        **{key: own[0][key] for key in ("policy", "name", "budget", "protocol", "quantization")},
        "tasks": len(own),
        "count": sum(cell["count"] for cell in own),
        "score": score,
        "interval": spread,
        **{
            key: {
                "mean": _mean([cell[key]["mean"] for cell in own]),
                "max": max(cell[key]["max"] for cell in own),
            }
            for key in ("units", "bytes", "bytes_after", "full_cache_bytes")
        },
        **{key: sum(cell[key] for cell in own) for key in ("cut", "answer_cut", "seconds")},
    }
    full = {cell["task"]: cell["scores"] for cell in cells if cell["row"] == FULL}
    if label != FULL and set(full) >= set(scores):
        change = {
            task: [a - b for a, b in zip(values, full[task], strict=True)]
            for task, values in scores.items()
        }
        mean, spread = average_of_tasks(change, groups)
        row |= {"difference": mean, "difference_interval": spread}
    return row


def _mean(numbers: Sequence[float]) -> float:
    return round(sum(numbers) / len(numbers), 1)


def _spread(numbers: Sequence[int]) -> dict[str, float] | None:
    return {"mean": _mean(numbers), "max": max(numbers)} if numbers else None


# ---- table ---------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The run as a Markdown table: a row for each row, a column for each task, in per cent."""
    tasks = list(dict.fromkeys(cell["task"] for cell in result["cells"]))
    short = _short_names(tasks)
    head = ["policy", "budget", "protocol", "mean", "to full", "units", "MiB", *short.values()]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for row in result["rows"]:
        cells = {cell["task"]: cell for cell in result["cells"] if cell["row"] == row["row"]}
        lines.append(
            [
                row["name"] + (f" {row['quantization']}" if row["quantization"] else ""),
                "all" if row["budget"] is None else str(row["budget"]),
                row["protocol"],
                with_interval(row["score"], row["interval"]),
                with_interval(row.get("difference"), row.get("difference_interval"), signed=True),
                f"{row['units']['mean']:.0f}",
                f"{row['bytes']['mean'] / 2**20:.1f}",
                *(_score(cells.get(task)) for task in tasks),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n" + _notes(result)


def _score(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return f"{100 * cell['score']:.1f}" + "*" * bool(cell["cut"])


def with_interval(
    value: float | None, interval: Sequence[float] | None, signed: bool = False
) -> str:
    """A score and its interval in per cent: `41.0 (36.2-45.5)`."""
    if value is None or interval is None:
        return "-"
    form, to = ("+.1f", " to ") if signed else (".1f", "-")
    low, high = (format(100 * bound, form) for bound in interval)
    return f"{format(100 * value, form)} ({low}{to}{high})"


def _short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Task labels without what all of them share: the family in front, the length behind."""
    shared = len({task.partition("@")[2] for task in tasks}) == 1
    short = {task: task.partition("@")[0] if shared else task for task in tasks}
    families = {name.partition("_")[0] for name in short.values()}
    if len(tasks) > 1 and len(families) == 1:
        short = {task: name.partition("_")[2] for task, name in short.items()}
    return short


def _notes(result: Mapping[str, Any]) -> str:
    cells = result["cells"]
    counts = sorted({cell["count"] for cell in cells})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    notes = [f"{several} samples a task; per cent, with 95 % bootstrap intervals."]
    cut = sum(cell["cut"] for cell in cells)
    if cut:
        lost = sum(cell["answer_cut"] for cell in cells)
        notes.append(
            f"\\* prompts were cut to fit: {cut} in all, in {lost} of them an answer was cut away."
        )
    return "\n" + " ".join(notes) + "\n"
