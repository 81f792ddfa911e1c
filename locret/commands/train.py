"""`python -m locret fit` and `adapt`: train retaining heads, or an adapter that lengthens contexts.

Both hand over to the package `trainers`, whose options they take, and are the only way from here to
Lightning: it is imported when one of them runs.
"""

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from locret.system.interrupts import ends_at_once

NAMES = ("fit", "adapt")
_HELP = {
    "fit": "train retaining heads",
    "adapt": "teach a small backbone long contexts by LoRA",
}


def add_to(commands: Any) -> None:
    """For the list of commands only: their arguments are the training's own."""
    for name in NAMES:
        commands.add_parser(name, help=_HELP[name], add_help=False)


def run(name: str, args: Sequence[str]) -> int:
    """Run the training `name`, of `NAMES`, with arguments of `trainers.cli`, such as `--config
    smollm2.yaml`; returns the exit status."""
    with ends_at_once():
        command_line = importlib.import_module("trainers.cli")
        training = importlib.import_module(f"trainers.{name}")
    return command_line.status(f"locret {name}", partial(training.main, list(args)))
