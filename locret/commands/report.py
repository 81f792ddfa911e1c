"""`python -m locret report`: tables and figures of many results."""

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    command = commands.add_parser("report", help="tables and figures of many results")
    command.add_argument("results", nargs="+", help="JSON files of results")
    command.add_argument("--out", type=Path, required=True, help="folder to write to")
    command.add_argument("--title", default="Results")
    command.set_defaults(run=_report)


def _report(given: argparse.Namespace) -> None:
    from locret.evaluation.report import MARKDOWN, make_report

    page = make_report(given.results, given.out, given.title)
    print(f"report   {page.with_name(MARKDOWN).resolve()}")
    print(f"page     {page.resolve()}")
