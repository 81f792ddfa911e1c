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
import sys
from collections.abc import Sequence

from locret.commands import (
    answer,
    artifacts,
    calibrate,
    evaluate,
    generate,
    needles,
    others,
    plan,
    serve,
    shared,
)
from locret.system import interrupts

COMMANDS = (generate, answer, serve, needles, evaluate, others, calibrate, artifacts, plan)
PARSED_BY_OTHERS = {evaluate.NAME: evaluate.run, others.HARNESS: others.harness}
"""What runs with arguments that are not parsed here."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (`locret.system.interrupts`)."""
    shared.replace_unprintable()
    args = sys.argv[1:] if args is None else args
    if args and args[0] in others.TRAININGS:  # which say themselves how they stop and go on
        return others.train(args[0], args[1:])
    given = _parsed(args)
    note = "stopped"
    if _keeps_answers(given):
        note += "; the same command goes on where it stopped"
    elif given.command == calibrate.NAME:
        note += "; nothing was written, and the same command begins anew"
    return interrupts.run_command(f"locret {given.command}", lambda: given.run(given), note=note)


def _keeps_answers(given: argparse.Namespace) -> bool:
    """Whether answers are written as they come, and asked for once."""
    asks = given.command in ("needle", "grid") and given.json_out is not None
    return asks or given.command in ("evaluate", answer.NAME)


def _parsed(args: Sequence[str]) -> argparse.Namespace:
    run = PARSED_BY_OTHERS.get(args[0] if args else "")
    if run is not None:
        return argparse.Namespace(command=args[0], run=lambda _: run(args[1:]))
    parser = argparse.ArgumentParser(
        prog="locret", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    return parser.parse_args(args)


if __name__ == "__main__":
    sys.exit(main())
