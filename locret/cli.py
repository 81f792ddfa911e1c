"""Command line: `python -m locret COMMAND --help`.

generate   answer a prompt of any length within a budget
fit        train retaining heads for a model
adapt      teach a small model long contexts, by LoRA
answer     every prompt of a JSONL file, on one machine or many
serve      an OpenAI-compatible server whose contexts fit a budget
needle     needle in a haystack under several policies, at one length or over a grid
grid       policies, bits and budgets at equal bytes, on synthetic retrieval
evaluate   benchmarks under several policies and budgets, with a manifest
reproduce  small slices of committed results again, on a CPU
lm_eval    lm-evaluation-harness with `--model locret` and our task files
calibrate  measure which KV heads need to keep more than others
convert    between the artifact folder and the released .bin format
inspect    what an artifact records, and whether its weights look sound
push       an artifact to the Hugging Face Hub
report     tables and figures of many results, as Markdown and HTML
plan       what fits into a given memory, from a model's config alone
"""

import argparse
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from locret.commands import evaluate, generate, heads, serve, shared
from locret.system.interrupts import ends_at_once, run_command

TRAININGS = {
    "fit": "train retaining heads",
    "adapt": "teach a small backbone long contexts by LoRA",
}
"""Commands of the package `trainers`: the only way from here to Lightning, which is imported when
one of them runs."""
HARNESS = "lm_eval"
PLUGIN = Path(__file__).parent / "integrations" / "lm_eval.yaml"
INCLUDE = "--include_path"


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (`locret.system.interrupts`)."""
    shared.replace_unprintable()
    args = sys.argv[1:] if args is None else args
    if args and args[0] in TRAININGS:  # which say themselves how they stop and go on
        return train(args[0], args[1:])
    given = _parsed(args)
    note = "stopped"
    if _keeps_answers(given):
        note += "; the same command goes on where it stopped"
    elif given.command == heads.CALIBRATE:
        note += "; nothing was written, and the same command begins anew"
    return run_command(f"locret {given.command}", lambda: given.run(given), note=note)


def _keeps_answers(given: argparse.Namespace) -> bool:
    """Whether answers are written as they come, and asked for once."""
    asks = given.command in ("needle", "grid") and given.json_out is not None
    return asks or given.command in (evaluate.NAME, generate.ANSWER)


def _parsed(args: Sequence[str]) -> argparse.Namespace:
    parsed_there = {evaluate.NAME: evaluate.run, HARNESS: harness}
    if args and args[0] in parsed_there:
        run = parsed_there[args[0]]
        return argparse.Namespace(command=args[0], run=lambda _: run(args[1:]))
    parser = argparse.ArgumentParser(
        prog="locret", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add_to in (generate.add_to, serve.add_to, evaluate.add_to, _add_others, heads.add_to):
        add_to(commands)
    return parser.parse_args(args)


# ---- command lines of others ---------------------------------------------------------------------


def _add_others(commands: Any) -> None:
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
    """Run lm-evaluation-harness's command line with our model and tasks in it.

    It finds models of other packages by no entry point: ours is imported before it runs, and our
    task files are put on its include path. Its own command imports our model when it reads a file
    that says so, given among its tasks:

        lm_eval --model locret --tasks TASK,$(python -m locret lm_eval --plugin) --model_args ...
    """
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
