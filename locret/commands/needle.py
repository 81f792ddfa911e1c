"""`python -m locret needle`: needles under several policies, at one length or over a map of lengths
and depths. It writes a configuration of `evaluate` and asks that."""

import argparse
from pathlib import Path
from typing import Any

from locret.commands import needles
from locret.commands.shared import Listed, whole
from locret.quantities import parse_tokens


def add_to(commands: Any) -> None:
    command = commands.add_parser("needle", help="needles under several policies")
    needles.add_arguments(command, ["full", "streaming_llm", "locret"], ratios=[8], tokens=3000)
    command.add_argument("--json-out", type=Path, help="write the result to this file")
    grid = command.add_argument_group("map of lengths and depths (--json-out is needed)")
    grid.add_argument("--grid", action="store_true", help="ask at --lengths x --depths")
    grid.add_argument(
        "--lengths",
        action=Listed,
        each=parse_tokens,
        help="of the prompts, such as 1024,2K; default 1K,2K,4K",
    )
    grid.add_argument("--depths", type=whole(1), help="default 10")
    grid.add_argument("--plot", type=Path, help="write the maps to this file")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Ask needles.

    Raises:
        ValueError: they cannot be asked (`locret.commands.needles`).
    """
    from locret.evaluation.figures import needle_map

    if given.plot and not given.grid:
        raise ValueError("--plot draws a map: give --grid and --json-out too, or leave --plot out")
    if given.grid and given.json_out is None:
        raise ValueError("a map needs --json-out FILE: answers are kept beside it as they come")
    values: dict[str, Any] = {}
    if given.grid:
        depths = given.depths or 10
        lengths = given.lengths or [1024, 2048, 4096]
        values = {"lengths": lengths, "depths": depths, "limit": depths * (given.count or 1)}
    elif given.lengths or given.depths:
        raise ValueError("--lengths and --depths are those of a map: give --grid too")
    setups = needles.setups_of(given.policies, [f"{ratio}x" for ratio in given.ratios])
    needles.ask(given, needles.config_of(given, setups, **values), needle_map)
