"""`python -m locret report` and `reproduce`: tables and figures of many results; small slices of
them again, on a CPU."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locret.commands.progress import Progress

MARK = ".reproduced"
"""A file that tells a reproduction's folder from one of `evaluate`, whose answers took hours."""

MADE = {"predictions", "sessions", "result.json", "result.md", "config.yaml", ".lock"}
"""What a reproduction leaves in its folder beside the mark."""


def add_to(commands: Any) -> None:
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


def _report(given: argparse.Namespace) -> None:
    from locret.evaluation.report import MARKDOWN, make_report

    page = make_report(given.results, given.out, given.title)
    print(f"report   {page.with_name(MARKDOWN).resolve()}")
    print(f"page     {page.resolve()}")


def _reproduce(given: argparse.Namespace) -> None:
    from locret.evaluation import reproduce as again
    from locret.evaluation.reproduce import Comparison, as_table

    changes = {"data_dir": given.data_dir, "limit": given.limit}
    changes = {name: value for name, value in changes.items() if value is not None}
    compared: list[Comparison] = []
    left_out: list[str] = []
    paths = again.result_files(given.results)
    for path in paths:
        _check(given.output / again.name_of(path), paths)
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


def _check(folder: Path, results: Sequence[Path]) -> None:
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
