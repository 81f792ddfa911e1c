"""`python -m locret evaluate`: benchmarks under several policies and budgets.

    python -m locret evaluate --config eval/ruler_smollm2.yaml --limit 10 --engine.chunk_size 256

Any value of the configuration can be overridden, as in trainings; lists are written as in YAML.

What becomes of results: `report` makes tables and figures of many, `reproduce` asks small slices of
them again, on a CPU.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locret.commands.progress import Progress

if TYPE_CHECKING:
    from locret.evaluation.ask import Ranks
    from locret.evaluation.config import EvalConfig
    from locret.evaluation.questions import Prepared

NAME = "evaluate"


def add_to(commands: Any) -> None:
    commands.add_parser(NAME, help="benchmarks under several policies and budgets", add_help=False)
    command = commands.add_parser("report", help="tables and figures of many results")
    command.add_argument("results", nargs="+", help="JSON files of results")
    command.add_argument("--out", type=Path, required=True, help="folder to write to")
    command.add_argument("--title", default="Results")
    command.set_defaults(run=_report)
    command = commands.add_parser("reproduce", help="run slices of committed results again")
    command.add_argument("results", nargs="+", type=Path, help="result files, or folders of them")
    command.add_argument("--data-dir", help="folder of the tasks' data files")
    command.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    command.add_argument("--limit", type=int, help="samples a task")
    command.set_defaults(run=_reproduce)


def run(args: Sequence[str]) -> None:
    """Run an evaluation, or the part of it that falls to this process."""
    from locret.evaluation.ask import Ranks
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


# ---- results: report and reproduce ---------------------------------------------------------------

MARK = ".reproduced"
"""A file that tells a reproduction's folder from one of `evaluate`, whose answers took hours."""

MADE = {"predictions", "sessions", "result.json", "result.md", "config.yaml", ".lock"}
"""What a reproduction leaves in its folder beside the mark."""


def _report(given: argparse.Namespace) -> None:
    from locret.evaluation.report import MARKDOWN, make_report

    page = make_report(given.results, given.out, given.title)
    print(f"report   {page.with_name(MARKDOWN).resolve()}")
    print(f"page     {page.resolve()}")


def _reproduce(given: argparse.Namespace) -> None:
    from locret.evaluation import evaluate as again
    from locret.evaluation.evaluate import Comparison, as_table

    changes = {"data_dir": given.data_dir, "limit": given.limit}
    changes = {name: value for name, value in changes.items() if value is not None}
    compared: list[Comparison] = []
    left_out: list[str] = []
    paths = again.result_files(given.results)
    for path in paths:
        _check_own(given.output / again.name_of(path), paths)
    for path in paths:
        name = again.name_of(path)
        folder = _cleared(given.output / name)
        with Progress(name) as progress:
            found = again.reproduce(path, folder, changes, progress)
        compared += found.compared
        left_out += [f"{name}: {reason}" for reason in found.left_out]
    for reason in left_out:
        print(f"left out  {reason}")
    print(as_table(compared))
    print(f"answers   {given.output.resolve()}")
    if not compared:
        raise ValueError("nothing could be run again; give the data with --data-dir")
    wrong = [f"{one.table}, {one.setup}" for one in compared if not one.reproduced]
    if wrong:
        raise ValueError(f"not reproduced: {'; '.join(wrong)}")
    print(f"all {len(compared)} setups reproduced")


def _check_own(folder: Path, results: Sequence[Path]) -> None:
    """Refuse a folder with anything but an earlier reproduction in it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give another one as --output")
    there = {path.name for path in folder.iterdir()}
    foreign = sorted(there - MADE - {MARK} if MARK in there else there)
    foreign += [path.name for path in results if folder.resolve() in path.resolve().parents]
    if foreign:
        raise ValueError(
            f"{folder} would be emptied, but holds {', '.join(dict.fromkeys(foreign))}; give "
            "another folder as --output"
        )


def _cleared(folder: Path) -> Path:
    """The folder without what an earlier reproduction made there: all is run from scratch."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / MARK).touch()
    return folder
