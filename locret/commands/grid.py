"""`python -m locret grid`: needles under policies, bits and budgets at equal bytes. It writes a
configuration of `evaluate` and asks that."""

import argparse
from pathlib import Path
from typing import Any

from locret.commands import needles
from locret.commands.shared import Listed, whole

FULL_BITS = 16


def add_to(commands: Any) -> None:
    command = commands.add_parser("grid", help="policies, bits and budgets at equal bytes")
    policies = ["full", "snapkv", "locret"]
    needles.add_arguments(command, policies, ratios=[128, 64, 32], tokens=4096)
    command.add_argument("--bits", action=Listed, each=whole(1), default=[16, 8, 4])
    command.add_argument("--quantization", default="kivi", help="the scheme below 16 bits")
    command.add_argument("--group", type=int, default=64)
    command.add_argument("--residual", type=int, default=0, help="units in full precision")
    command.add_argument(
        "--query-aware", action="store_true", help="policies see the question before they evict"
    )
    command.add_argument(
        "--one-shot",
        action="store_true",
        help="read the prompt at once, not in chunks within the budget",
    )
    command.add_argument("--json-out", type=Path, required=True, help="the result")
    command.add_argument("--plot", type=Path, help="quality against bytes")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Ask a grid.

    Raises:
        ValueError: it cannot be asked (`locret.commands.needles`).
    """
    from locret.evaluation.figures import against_bytes

    options = {"group": given.group, "residual": given.residual}
    schemes = [
        None if bits == FULL_BITS else {"name": given.quantization, "bits": bits, **options}
        for bits in given.bits
    ]
    setups = needles.setups_of(
        given.policies,
        [f"{ratio}x bytes" for ratio in given.ratios],
        quantization=schemes,
        protocol="query_aware" if given.query_aware else "query_agnostic",
    )
    engine = {"chunk_size": None if given.one_shot else 512}
    needles.ask(given, needles.config_of(given, setups, engine=engine), against_bytes)
