"""`python -m locret evaluate`: benchmarks under several policies and budgets."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from locret.commands.progress import Progress
from locret.commands.shared import DTYPES, MODEL, Listed
from locret.quantities import parse_tokens

if TYPE_CHECKING:
    from locret.evaluation.config import EvalConfig
    from locret.evaluation.preparing import Prepared

OVERRIDES = ("model", "adapter", "heads", "dtype", "device", "data_dir", "output", "limit")
LISTS = ("tasks", "lengths")


def add_to(commands: Any) -> None:
    command = commands.add_parser("evaluate", help="benchmarks under several policies and budgets")
    command.add_argument("--config", help="a YAML file, or a name in configs/eval")
    command.add_argument("--tasks", action=Listed, help="tasks or groups of tasks")
    command.add_argument(
        "--lengths", action=Listed, each=parse_tokens, help="of tasks made to a length, such as 4K"
    )
    command.add_argument("--limit", type=int, help="samples a task")
    command.add_argument("--data-dir", help="folder of the tasks' data files")
    command.add_argument("--output", help="folder for predictions and results")
    command.add_argument("--model", help=MODEL)
    command.add_argument("--adapter", help="PEFT adapter of the model: folder or Hub id")
    command.add_argument("--heads", help="artifact folder, .bin file, or Hub id")
    command.add_argument("--dtype", choices=("auto", *DTYPES))
    command.add_argument("--device")
    command.add_argument("--batch-size", type=int, help="samples asked at a time")
    command.add_argument("--processes", type=int, default=1, help="that share the questions")
    command.add_argument("--minutes", type=float, help="ask no more after that time")
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="any value of the configuration",
    )
    command.add_argument("--dry-run", action="store_true", help="only show what would be asked")
    command.add_argument("--list-tasks", action="store_true", help="show the tasks there are")
    command.set_defaults(run=run)


def config_of(given: argparse.Namespace) -> "EvalConfig":
    """The configuration that a command line asks for.

    Raises:
        ValueError: no configuration was named, or it cannot be (`locret.evaluation.config`).
    """
    from locret.evaluation.config import read_config

    if not given.config:
        raise ValueError("give a configuration with --config, such as eval/ruler_smollm2.yaml")
    overrides = {name: getattr(given, name) for name in (*OVERRIDES, *LISTS, "batch_size")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    return read_config(given.config, overrides | _settings(given.set))


def _settings(texts: list[str]) -> dict[str, Any]:
    """`a.b=VALUE` as names and values; values are YAML."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text} is no NAME=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {text}: {value!r} is no YAML value") from error
    return found


def run(given: argparse.Namespace) -> None:
    """Run an evaluation, or the part of it that falls to this process."""
    from locret.evaluation import evaluate
    from locret.evaluation.preparing import prepare
    from locret.evaluation.processes import Ranks

    if given.list_tasks:
        print(_tasks())
        return
    config, ranks = config_of(given), Ranks.of_environment()
    if given.dry_run:
        print(_plan(prepare(config)))
        return
    command = "python -m locret " + shlex.join(sys.argv[1:])
    progress = Progress("asking") if ranks.rank == 0 else None
    path = evaluate.run(config, command, ranks, progress, given.processes, given.minutes)
    if path is None:
        print(f"rank {ranks.rank} of {ranks.world}: done; there are questions left")
    elif ranks.world == 1 or given.processes == 1:
        _say(path)


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
