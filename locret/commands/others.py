"""`python -m locret fit`, `adapt` and `lm_eval`: command lines of others, whose options they take.

`fit` trains retaining heads, `adapt` an adapter that lengthens contexts: both are of the package
`trainers`, and are the only way from here to Lightning, which is imported when one of them runs.

`lm_eval` is lm-evaluation-harness with our model and tasks in it. The harness finds models of other
packages by no entry point: this imports ours before its command line runs, and puts our task files
on its include path. Its own command imports our model when it reads a file that says so, given
among its tasks:

    lm_eval --model locret --tasks TASK,$(python -m locret lm_eval --plugin) --model_args ...
"""

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from locret.system.interrupts import ends_at_once

TRAININGS = {
    "fit": "train retaining heads",
    "adapt": "teach a small backbone long contexts by LoRA",
}
HARNESS = "lm_eval"
PLUGIN = Path(__file__).parents[1] / "integrations" / "lm_eval.yaml"
INCLUDE = "--include_path"


def add_to(commands: Any) -> None:
    """For the list of commands only: their arguments are the others' own."""
    for name, text in TRAININGS.items():
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser(HARNESS, help="lm-evaluation-harness with --model locret")


def train(name: str, args: Sequence[str]) -> int:
    """Run one of `TRAININGS` with arguments of `trainers.cli`, such as `--config smollm2.yaml`;
    returns the exit status."""
    with ends_at_once():
        command_line = importlib.import_module("trainers.cli")
        training = importlib.import_module(f"trainers.{name}")
    return command_line.status(f"locret {name}", partial(training.main, list(args)))


def harness(args: Sequence[str]) -> None:
    """Run the harness's command line."""
    if list(args) == ["--plugin"]:
        print(PLUGIN)
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval needs the package lm-eval: pip install 'locret[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import locret.integrations.lm_eval  # noqa: F401 - registers the model

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
    from locret.integrations.lm_eval_tasks import write_task_files

    return [*args, INCLUDE, str(write_task_files(Path(folder)))]
