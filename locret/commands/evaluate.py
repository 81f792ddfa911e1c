"""`python -m locret evaluate`: benchmarks under several policies and budgets.

    python -m locret evaluate --config eval/ruler_smollm2.yaml --limit 10 --engine.chunk_size 256

Any value of the configuration can be overridden, as in trainings; lists are written as in YAML.
"""

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locret.commands.progress import Progress

if TYPE_CHECKING:
    from locret.evaluation.config import EvalConfig
    from locret.evaluation.processes import Ranks
    from locret.evaluation.questions import Prepared

NAME = "evaluate"


def add_to(commands: Any) -> None:
    commands.add_parser(NAME, help="benchmarks under several policies and budgets", add_help=False)


def run(args: Sequence[str]) -> None:
    """Run an evaluation, or the part of it that falls to this process."""
    from locret.evaluation.processes import Ranks
    from locret.evaluation.questions import prepare

    args = [_with_underscores(text) for text in args]
    if {"--help", "-h"} & set(args):
        _parser().print_help()
        return
    if "--list_tasks" in args:
        print(_tasks())
        return
    config, given = _configured(args)
    ranks = Ranks.of_environment()
    if given.dry_run:
        print(_plan(prepare(config)))
        return
    path = ask(config, ranks, given.processes, given.minutes)
    if path is None and ranks.world == 1:
        raise ValueError("there are answers to give yet: run the same command again")
    if path is None:
        print(f"rank {ranks.rank} of {ranks.world}: done; other processes have questions left")
    elif ranks.world == 1 or given.processes == 1:
        _say(path)


def ask(config: "EvalConfig", ranks: "Ranks", processes: int, minutes: float | None) -> Path | None:
    """`locret.evaluation.evaluate.run`; the first process shows how far it is."""
    from locret.evaluation import evaluate

    command = "python -m locret " + shlex.join(sys.argv[1:])
    with Progress("asking") if ranks.rank == 0 else contextlib.nullcontext() as progress:
        return evaluate.run(config, command, ranks, progress, processes, minutes)


def _configured(args: Sequence[str]) -> tuple["EvalConfig", Any]:
    """The configuration that a command line asks for, and all that it says."""
    from locret.evaluation.config import parsed, read_values

    words = [word for text in args for word in text.split("=", 1)]
    names = [name for flag, name in zip(words, words[1:], strict=False) if flag == "--config"]
    if not names:
        raise ValueError("give a configuration with --config, such as eval/ruler_smollm2.yaml")
    return parsed(_parser(), args, read_values(names[-1]))


def _parser() -> Any:
    from locret.evaluation.config import parser

    made = parser(prog="locret evaluate", description=__doc__)
    made.add_argument("--processes", type=int, default=1, help="that share the questions")
    made.add_argument("--minutes", type=float, help="ask no more after that time")
    made.add_argument("--dry_run", action="store_true", help="only show what would be asked")
    made.add_argument("--list_tasks", action="store_true", help="show the tasks there are")
    return made


def _with_underscores(text: str) -> str:
    """`--data-dir` as `--data_dir`."""
    name, equals, value = text.partition("=")
    is_name = name.startswith("--")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if is_name else text


def _tasks() -> str:
    from locret.tasks import GROUPS, TASKS

    groups = [f"{name:<28} {names[0]} ... {names[-1]}" for name, names in GROUPS.items()]
    tasks = [f"{name:<28} scored by {', '.join(task.metrics)}" for name, task in TASKS.items()]
    return "\n".join(groups + tasks)


def _plan(prepared: "Prepared") -> str:
    asked = prepared.asked
    setups = dict.fromkeys(question.setup.label for question in asked)
    counts: dict[str, list[int]] = {}
    for question in asked:
        if question.setup.label == next(iter(setups)):
            counts.setdefault(question.task.label, []).append(len(question.prompt.ids))
    lines = [f"{len(setups)} setups: {', '.join(setups)}"]
    lines += [
        f"{label:<34} {len(sizes):>5} samples of {min(sizes)} to {max(sizes)} tokens"
        for label, sizes in counts.items()
    ]
    return "\n".join([*lines, f"{len(asked)} answers, into {prepared.output.resolve()}"])


def _say(path: Path) -> None:
    """What was made, and where."""
    from locret.evaluation import tables

    result = json.loads(path.read_text(encoding="utf-8"))
    print(tables.as_markdown(result))
    print(f"table        {path.with_suffix('.md').resolve()}")
    print(f"figures      {path.resolve()}")
    print(f"predictions  {(path.parent / 'predictions').resolve()}")
