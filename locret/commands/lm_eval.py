"""`python -m locret lm_eval ...`: the harness's own command line, with our model and tasks in it.

The harness finds models of other packages by no entry point, so that something must import ours
before its command line runs; this does, and puts our task files on its include path. Its own
`lm_eval` command imports our model when it reads a file that says so, given among its tasks:

    lm_eval --model locret --tasks TASK,$(python -m locret lm_eval --plugin) --model_args ...
"""

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "lm_eval"
PLUGIN = Path(__file__).parents[1] / "integrations" / "lm_eval" / "locret.yaml"
INCLUDE = "--include_path"


def add_to(commands: Any) -> None:
    """For the list of commands only: its arguments are the harness's own."""
    commands.add_parser(NAME, help="lm-evaluation-harness with --model locret")


def run(args: Sequence[str]) -> None:
    """Run the harness's command line."""
    if list(args) == ["--plugin"]:
        print(PLUGIN)
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval needs the package lm-eval: pip install 'locret[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import locret.integrations.lm_eval.model  # noqa: F401 - registers the model

    with tempfile.TemporaryDirectory(prefix="locret-tasks-") as folder:
        own, sys.argv = sys.argv, ["lm_eval", *with_our_tasks(args, folder)]  # where it looks
        try:
            cli_evaluate()
        finally:
            sys.argv = own


def with_our_tasks(args: Sequence[str], folder: str) -> list[str]:
    """The arguments, with the folder on the include path, to which our task files are written, if
    they name no other one."""
    named = any(arg.partition("=")[0] == INCLUDE for arg in args)
    if named or not args or {"-h", "--help"} & set(args):
        return [*args]
    from locret.integrations.lm_eval.tasks import write_task_files

    return [*args, INCLUDE, str(write_task_files(Path(folder)))]
