"""Train retaining heads: `locret fit --config smollm2.yaml` (see `trainers.cli`).

A config may name others of `trainers.tune`, `then: [qwen25_coder_kl.yaml]`: the heads that were
trained are tuned by them next, in the same command. `--then null` stops after the first stage.
"""

import gc
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from locret.system.interrupts import Stopped, ends_at_once, handled_by

with ends_at_once():
    import yaml
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser

    from locret.model.loading import load_config
    from locret.system.files import find_config
    from locret.training.gated import check_gates, check_tunable_as
    from trainers import cli, tune
    from trainers.callbacks import ExportHeads
    from trainers.gated import GatedModule
    from trainers.module import HeadsModule


class FitCLI(cli.TrainingCLI):
    """With the names of later stages."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--then",
            type=str | list[str] | None,
            default=None,
            help="configs of trainers.tune, one or a list, which go on from these heads in turn; "
            "the last one writes OUTPUT_tuned",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """And look at later stages, before anything of the first is made."""
        super().parse_arguments(parser, args)
        if self.config.then is not None:
            _check_later_stages(self.config)


def main(args: list[str] | None = None) -> Path | None:
    """Run a training; returns the folder of the artifact, None after a check (`trainers.cli`)."""
    training: Any = cli.build(HeadsModule, ExportHeads, args, kind=FitCLI)
    output = cli.run(training)
    stages = [] if output is None else _later_stages(training, output)
    for config, arguments in stages:
        print(f"next      these heads are tuned by {config}", flush=True)
        # What was interrupted is the first stage that is not at its end; checkpoints of stages
        # behind it are an earlier training's.
        resumes = training.was_finished and training.config.ckpt_path == "last"
        with _signals_noted():
            training = None  # and its model, before the next one is loaded
            gc.collect()
        training = tune.build([*arguments, *(["--ckpt_path=last"] if resumes else [])])
        output = cli.run(training)
    cli.tell_how_to_use(training, output)
    return output


@contextmanager
def _signals_noted() -> Iterator[None]:
    """Python drops what is raised while objects are collected, so signals are raised behind it."""
    signals: list[int] = []
    with handled_by(lambda number, frame: signals.append(number)):
        yield
    if signals:
        raise Stopped(signals[0], "stopped between the stages; go on with --ckpt_path last")


Stage = tuple[str, list[str]]
"""A config of `trainers.tune`, and all arguments of its run."""


def _later_stages(training: cli.TrainingCLI, output: Path) -> list[Stage]:
    """Those that go on from the heads in `output`; none where several processes would have to be
    started for them again, which is told then."""
    trainer, stages = training.trainer, _stages(training.config, output)
    if trainer.world_size > 1:
        if trainer.is_global_zero:
            for _, arguments in stages:
                print("next      python -m trainers.tune " + " ".join(arguments))
        return []
    return stages


def _stages(config: Any, output: Path) -> list[Stage]:
    """Each starts from the heads before; the last one makes OUTPUT_tuned."""
    then = config.then or []
    names = [then] if isinstance(then, str) else then
    stages, heads = [], output
    named = output if output.name.strip(".") else output.resolve()  # "." has no name
    for number, name in enumerate(names, 1):
        end = "_tuned" if number == len(names) else f"_tuned_{number}"
        made = named.with_name(named.name + end)
        arguments = [
            f"--config={name}",
            f"--model.model={config.model.model}",
            f"--model.heads={heads}",
            f"--output={made}",
            f"--trainer.accelerator={config.trainer.accelerator}",
            f"--trainer.devices={config.trainer.devices}",
        ]
        stages.append((name, arguments))
        heads = made
    return stages


def _check_later_stages(config: Any) -> None:
    """
    Raises:
        ValueError: a later stage is not there, or cannot go on from what the first will make.
    """
    given = config.model
    folders = _checkpoint_folders(config)
    for name, arguments in _stages(config, Path(config.output or "heads")):
        try:
            _check_is_of_tune(name)
            check_gates(load_config(given.model, revision=given.revision))
            stage = tune.build(arguments)
            check_tunable_as(
                given.label,
                given.query_tokens,
                bool(given.quota_contexts or given.heads),  # those of others may have been measured
                stage.model.hparams["threshold"],
            )
            own = _checkpoint_folders(stage.config)
            if own & folders:
                raise ValueError(
                    "its checkpoints go where those of a stage before it are, to "
                    f"{min(own & folders)}; give it a dirpath of its own"
                )
            folders |= own
        except ValueError as error:
            raise ValueError(f"the later stage, {name}: {error}") from error


def _check_is_of_tune(name: str) -> None:
    """
    Raises:
        ValueError: a file that says of the model what `trainers.tune` does not know.
    """
    said = yaml.safe_load(find_config(name).read_text(encoding="utf-8"))
    model = said.get("model") if isinstance(said, dict) else None
    unknown = sorted({*(model or {})} - {*inspect.signature(GatedModule).parameters})
    if unknown:
        raise ValueError(
            f"it says {', '.join(f'model.{key}' for key in unknown)}, which trainers.tune does not "
            "know; expected a config of trainers.tune, such as qwen25_coder_kl.yaml"
        )


def _checkpoint_folders(config: Any) -> set[Path]:
    """Where a training's checkpoints go, as far as its configuration says."""
    given = config.trainer.callbacks or []
    callbacks = given if isinstance(given, list) else [given]
    named = [(callback.get("init_args") or {}).get("dirpath") for callback in callbacks]
    return {Path(folder).resolve() for folder in named if folder}


if __name__ == "__main__":
    sys.exit(cli.status("trainers.fit", main))
