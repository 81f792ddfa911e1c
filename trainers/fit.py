"""Train retaining heads: `locret fit --config smollm2.yaml` (see `trainers.cli`).

A config may name another one of `trainers.tune`, `then: qwen25_coder_kl.yaml`: the heads that were
trained are tuned by it next, in the same command. `--then null` stops after the first stage.
"""

import gc
import sys
from pathlib import Path
from typing import Any

from locret.system.interrupts import Stopped, ends_at_once, handled_by

with ends_at_once():
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser

    from locret.model.loading import load_config
    from locret.training.gated import check_gates, check_tunable_as
    from trainers import cli, tune
    from trainers.callbacks import ExportHeads
    from trainers.module import HeadsModule


class FitCLI(cli.TrainingCLI):
    """With the name of a second stage."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--then",
            type=str | None,
            default=None,
            help="config of trainers.tune, which goes on from these heads and writes OUTPUT_tuned",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """And look at the second stage, before anything of the first is made."""
        super().parse_arguments(parser, args)
        if self.config.then is not None:
            _check_second_stage(self.config)


def main(args: list[str] | None = None) -> Path | None:
    """Run a training; returns the folder of the artifact, None after a check (`trainers.cli`)."""
    training = cli.build(HeadsModule, ExportHeads, args, kind=FitCLI)
    output = cli.run(training)
    more = None if output is None else _second_stage(training, output)
    if more is None:
        cli.tell_how_to_use(training, output)
        return output
    signals: list[int] = []
    # Python drops what is raised while objects are collected, so a signal is only noted meanwhile.
    with handled_by(lambda number, frame: signals.append(number)):
        del training  # and its model, before the next one is loaded
        gc.collect()
    if signals:
        raise Stopped(signals[0], "stopped between the stages; go on with --ckpt_path last")
    return tune.main(more)


def _second_stage(training: cli.TrainingCLI, output: Path) -> list[str] | None:
    """The arguments of `trainers.tune` that go on from the heads in `output`; None = no such stage,
    or one that several processes would have to be started for again, which is told then."""
    config, trainer = training.config, training.trainer
    if config.then is None:
        return None
    arguments = _second_arguments(config, output)
    if training.was_finished and config.ckpt_path == "last":
        arguments.append("--ckpt_path=last")  # the second stage is what was interrupted
    if trainer.world_size == 1:
        print(f"next      these heads are tuned by {config.then}", flush=True)
        return arguments
    if trainer.is_global_zero:
        print("next      python -m trainers.tune " + " ".join(arguments))
    return None


def _second_arguments(config: Any, output: Path) -> list[str]:
    return [
        f"--config={config.then}",
        f"--model.model={config.model.model}",
        f"--model.heads={output}",
        f"--output={output.with_name(output.name + '_tuned')}",
        f"--trainer.accelerator={config.trainer.accelerator}",
        f"--trainer.devices={config.trainer.devices}",
    ]


def _check_second_stage(config: Any) -> None:
    """
    Raises:
        ValueError: the second stage is not there, or cannot go on from what the first will make.
    """
    given = config.model
    try:
        check_gates(load_config(given.model, revision=given.revision))
        second = tune.build(_second_arguments(config, Path(config.output or "heads")))
        check_tunable_as(
            given.label,
            given.query_tokens,
            bool(given.quota_contexts or given.heads),  # those of others may have been measured
            second.model.hparams["threshold"],
        )
    except ValueError as error:
        raise ValueError(f"the second stage, {config.then}: {error}") from error


if __name__ == "__main__":
    sys.exit(cli.status("trainers.fit", main))
