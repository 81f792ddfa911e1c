"""How much less likely the right answers get: their loss under every setup of an evaluation.

    python -m benchmarks.answer_loss --config eval/bits_qwen.yaml --values limit=10 --out r.json

Each setup reads a question's context as `python -m locret evaluate` does (the same configuration,
and any of its values may be given instead), and is then given the rest of the prompt and the right
answer. Loss is the mean over the answer's tokens of -log p, lower is better. A few dozen questions
tell setups apart that right or wrong answers do not. Figures by setup and task:
  loss        mean over questions
  over full   of the same questions, less that under the full cache; with its standard error
  right       questions whose every token is the likeliest one
The JSON holds every question and is written after each.
"""

import argparse
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from locret.evaluation.ask import Asker, Ranks
from locret.evaluation.config import parsed, parser, read_values
from locret.evaluation.evaluate import load_asker
from locret.evaluation.questions import Question, prepare
from locret.model.hooks import as_argument

Row = dict[str, Any]
"""One question under one setup: setup, task, sample, loss, right."""


def main(args: Sequence[str] | None = None) -> None:
    """Ask every question under every setup, print figures of each task and write the JSON."""
    given = _parser().parse_args(args)
    values = [f"--{value}" for value in given.values]
    config, _ = parsed(parser(), values, read_values(given.config))
    prepared = prepare(config)
    asker = load_asker(prepared, Ranks())
    rows: list[Row] = []
    settings = vars(given) | {"evaluation": config.to_dict()}
    for task, of_task in groupby(_by_question(prepared.asked), key=lambda q: q.task.label):
        for question in of_task:
            rows.append(_asked(asker, question))
            record.write(given.out, settings, {"rows": rows}, announce=False)
        print(f"{task}\n{_told(rows, task)}", flush=True)
    record.write(given.out, settings, {"tasks": _figures(rows), "rows": rows})


def _by_question(asked: Sequence[Question]) -> list[Question]:
    """A task's questions one after the other, each under all setups."""
    tasks = list(dict.fromkeys(question.task.label for question in asked))
    samples = list(dict.fromkeys(question.sample.id for question in asked))
    return sorted(asked, key=lambda q: (tasks.index(q.task.label), samples.index(q.sample.id)))


@torch.no_grad()
def _asked(asker: Asker, question: Question) -> Row:
    model, ids = asker.model, question.prompt.ids
    answer = _right_answer(question)
    right = asker.tokenizer(answer, add_special_tokens=False)["input_ids"]
    context, rest = ids[: question.compressed], [*ids[question.compressed :], *right]
    engine = asker.engines.get(question.setup, question.budget)
    query = {"query_ids": _row(question.query, model)} if question.query else {}
    with engine:
        cache = engine.prefill(_row(context, model), **query)
        logits = model(_row(rest, model), **as_argument(model, cache, "forward")).logits[0]
    # The last token before an answer says its first one, and the answer's last one says nothing.
    likely = logits[-len(right) - 1 : -1].float().log_softmax(-1)
    tokens = torch.tensor(right, device=likely.device)
    return {
        "setup": question.setup.label,
        "task": question.task.label,
        "sample": question.sample.id,
        "tokens": len(right),
        "loss": -likely.gather(1, tokens[:, None]).mean().item(),
        "right": bool((likely.argmax(-1) == tokens).all()),
    }


def _right_answer(question: Question) -> str:
    """The first reference, or all where one alone is not the whole answer."""
    task, sample = question.task, question.sample
    score = task.score(sample, sample.answers[0])[task.metrics[0]]
    return sample.answers[0] if score == 1 else ", ".join(sample.answers)


def _row(ids: Sequence[int], model: Any) -> Tensor:
    return torch.tensor([list(ids)], device=model.device)


def _figures(rows: Sequence[Row], only: str | None = None) -> list[Row]:
    """Of every task and setup."""
    full = {(row["task"], row["sample"]): row["loss"] for row in rows if row["setup"] == "full"}
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if only in (None, row["task"]):
            found.setdefault((row["task"], row["setup"]), []).append(row)
    figures = []
    for (task, setup), of in found.items():
        figure = {"task": task, "setup": setup, "count": len(of), "loss": _mean(of, "loss")}
        figure |= {"right": sum(row["right"] for row in of)}
        if full and setup != "full":
            over = [row["loss"] - full[row["task"], row["sample"]] for row in of]
            mean = sum(over) / len(over)
            spread = sum((x - mean) ** 2 for x in over) / max(1, len(over) - 1)
            figure |= {"over_full": mean, "error": math.sqrt(spread / len(over))}
        figures.append(figure)
    return figures


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _told(rows: Sequence[Row], task: str) -> str:
    """A line for each setup."""
    lines = []
    for figure in _figures(rows, task):
        over = ""
        if "over_full" in figure:
            over = f"over full {figure['over_full']:+.4f} (error {figure['error']:.4f})"
        right = f"{figure['right']} of {figure['count']} right"
        lines.append(f"  {figure['setup']:<64} loss {figure['loss']:.4f}  {right}  {over}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file, or a name in configs/eval")
    parser.add_argument(
        "--values", nargs="+", default=[], metavar="NAME=VALUE", help="instead of the file's"
    )
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
