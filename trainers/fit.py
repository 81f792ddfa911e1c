"""Train retaining heads: `locret fit --config smollm2.yaml` (see `trainers.cli`)."""

import sys
from pathlib import Path

from locret.system.interrupts import ends_at_once

with ends_at_once():
    from trainers import cli
    from trainers.callbacks import ExportHeads
    from trainers.module import HeadsModule


def main(args: list[str] | None = None) -> Path | None:
    """Run a training; returns the folder of the artifact, None after a check (`trainers.cli`)."""
    training = cli.build(HeadsModule, ExportHeads, args)
    output = cli.run(training)
    cli.tell_how_to_use(training, output)
    return output


if __name__ == "__main__":
    sys.exit(cli.status("trainers.fit", main))
