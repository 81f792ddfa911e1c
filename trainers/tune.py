"""Tune trained heads by what answers lose: `python -m trainers.tune --config NAME`.

The second stage of heads that learned log p by regression (`trainers.fit`): a few hundred steps of
KL(full || gated), the backbone frozen (`locret.training.gated`). See `trainers.cli` for the options
every training shares.
"""

import sys
from pathlib import Path

from locret.system.interrupts import ends_at_once

with ends_at_once():
    from trainers import cli
    from trainers.callbacks import ExportTunedHeads
    from trainers.gated import GatedModule


def build(args: list[str] | None = None) -> cli.TrainingCLI:
    """The training that a command line means, nothing loaded yet.

    Raises:
        ValueError: samples have no branches.
    """
    training = cli.build(GatedModule, ExportTunedHeads, args)
    cli.check_branches(training)
    return training


def main(args: list[str] | None = None) -> Path | None:
    """Run a training; returns the folder of the artifact, None after a check (`trainers.cli`)."""
    training = build(args)
    output = cli.run(training)
    cli.tell_how_to_use(training, output)
    return output


if __name__ == "__main__":
    sys.exit(cli.status("trainers.tune", main))
