"""Teach a small backbone long contexts by LoRA: `locret adapt --config NAME`.

A small model loses needles beyond one or two thousand tokens; no eviction policy can give back what
the full cache does not find. Given heads, the model learns instead to answer from what they keep of
a context. See `trainers.cli` for the options every training shares.
"""

import sys
from pathlib import Path

from locret.system.interrupts import ends_at_once

with ends_at_once():
    from trainers import cli
    from trainers.adapter import AdapterModule
    from trainers.callbacks import ExportAdapter


def main(args: list[str] | None = None) -> Path | None:
    """Run a training; returns the folder of the adapter, None after a check (`trainers.cli`)."""
    training = cli.build(AdapterModule, ExportAdapter, args, "locret adapt")
    if training.model.hparams["heads"] is not None:
        cli.check_branches(training)
    return cli.run(training)


if __name__ == "__main__":
    sys.exit(cli.status("trainers.adapt", main))
