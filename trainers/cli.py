"""The command line that every training shares: LightningCLI, config names, output, resume.

A bare config name is looked up in configs/. Any value can be overridden on the command line
(`--model.lr 1e-3`, `--trainer.max_steps 100`); `--help` lists them all, `--print_config` shows what
would run. Ctrl-C and SIGTERM are safe: `--ckpt_path last` goes on from the last checkpoint.
"""

import logging
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from datamodules.datamodule import ConversationDataModule
from locret.system.files import check_named, find_config
from locret.system.interrupts import Stopped, run_command
from trainers.callbacks import (
    Export,
    PlainProgress,
    StopBetweenSteps,
    signal_behind,
    where_it_stopped,
)


class TrainingCLI(LightningCLI):
    """LightningCLI with an output folder and a checkpoint to resume from.

    Attributes:
        was_finished: the run went on from its own last step, and took none.
    """

    was_finished = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, help="folder for what is trained")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume: path or last"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = sys.argv[1:] if args is None else args
        assert isinstance(given, list)
        self.config = parser.parse_args(_with_config_paths(given))


def build(
    module: type[LightningModule],
    export: type[SaveConfigCallback],
    args: list[str] | None,
    command: str = "locret fit",
    kind: type[TrainingCLI] = TrainingCLI,
) -> TrainingCLI:
    """Parse the command line (`args`, or the process's own) and make trainer, module and data.

    Args:
        command: what `--help` calls it.
        kind: with arguments of its own.
    """
    _silence()
    return kind(
        module,
        ConversationDataModule,
        run=False,
        args=args,
        parser_kwargs={"prog": command},
        save_config_callback=export,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={"callbacks": [StopBetweenSteps(), PlainProgress()]},
    )


def _silence() -> None:
    """What Lightning tells users of a run that they cannot change."""
    # A run without validation data is no mistake.
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # An advertisement.
    told = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    told.addFilter(lambda record: "Tip:" not in record.getMessage())


def status(name: str, main: Callable[[], object]) -> int:
    """Run a training as a command; returns the exit status (`locret.system.interrupts`)."""
    errors = (ValueError, OSError, MisconfigurationException)
    note = "" if rank_zero_only.rank else "stopped before the first step; nothing was saved yet"
    return run_command(name, main, errors=errors, note=note)


def run(cli: TrainingCLI) -> Path | None:
    """Train, say what was made, and return its folder; None after a check (`fast_dev_run`).

    Raises:
        ValueError: no output folder is given, nothing can be written there, or no step was taken.
        Stopped: a signal came; tells how to go on.
    """
    output, trainer = _made(cli.config.output), cli.trainer
    if trainer.fast_dev_run:  # Lightning would save the last step over that of a real run
        for callback in trainer.checkpoint_callbacks:
            callback.save_last = False  # type: ignore[attr-defined]
    _check_checkpoint(cli.config.ckpt_path)
    try:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
        if not trainer.fast_dev_run:
            _export(cli)
        cli.datamodule.gather_counts()
    except BaseException as error:
        number, ckpt_path = signal_behind(error, trainer), cli.config.ckpt_path
        if number is not None:
            raise Stopped(number, where_it_stopped(trainer, ckpt_path)) from error
        if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
            says = " ".join(str(error).split())
            raise ValueError(
                f"checkpoint {ckpt_path} is of a training with other settings; give those of that "
                f"run, or leave --ckpt_path out: {says}"
            ) from error
        raise
    if trainer.is_global_zero:
        _tell(cli, output)
    return None if trainer.fast_dev_run else output


def check_branches(cli: TrainingCLI) -> None:
    """Refuse data without branches, where a training learns from what these lose.

    Raises:
        ValueError: samples have no branches.
    """
    if cli.datamodule.branching is None:
        raise ValueError(
            "data.branches is null; this training learns from what branches lose: give "
            "[answer, replay]"
        )


def tell_how_to_use(cli: TrainingCLI, heads: Path | None) -> None:
    """The command that generates with the heads just trained, if there are any."""
    if heads is not None and cli.trainer.is_global_zero:
        model = cli.model.hparams["model"]
        print(f"next      python -m locret generate --model {model} ", end="")
        print(f"--heads {heads} --prompt-file FILE")


def _check_checkpoint(ckpt_path: str | None) -> None:
    """Refuse a file that no training wrote.

    Raises:
        ValueError: the path is empty, or the file is there and is not a checkpoint.
    """
    check_named(ckpt_path, "ckpt_path")
    if ckpt_path is not None and Path(ckpt_path).is_file() and not zipfile.is_zipfile(ckpt_path):
        raise ValueError(f"checkpoint {ckpt_path} is damaged, or was never one; name another")


def _export(cli: TrainingCLI) -> None:
    """Write what was trained, if the training has not done so at its end: one that goes on from its
    own last step takes no step, and does not end.

    Raises:
        ValueError: no step was ever taken.
    """
    trainer = cli.trainer
    if trainer.global_step == 0:
        raise ValueError(
            "nothing was trained, and nothing is written: no step was taken with "
            f"max_steps {trainer.max_steps}, max_epochs {trainer.max_epochs} and "
            f"limit_train_batches {trainer.limit_train_batches}; give numbers above 0 (-1 steps or "
            "epochs: no limit)"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, Export) and not callback.written:
            cli.was_finished = True
            callback.write(trainer, cli.model)


def _tell(cli: TrainingCLI, output: Path) -> None:
    """What was used, what came of it, and where it is."""
    steps = cli.trainer.global_step
    figures = {name: round(float(v), 4) for name, v in cli.trainer.callback_metrics.items()}
    print(_data_table(cli.datamodule.report()))
    print(f"figures   {figures}")
    if cli.trainer.fast_dev_run:
        print(f"checked   steps run: {steps}; fast_dev_run only checks, nothing is written")
    else:
        print(f"made      {output.resolve()}")


def _made(output: str | None) -> Path:
    """The output folder, made and tried before a training of hours needs it."""
    if not output:
        raise ValueError("no output is given: say --output FOLDER, for what is trained")
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"output {output!r} is no folder to write to: {error}") from error
    return folder


def _data_table(report: dict[str, Any]) -> str:
    """One line a source: what was used, cut and skipped, and why."""
    lines = []
    for stage, sources in report.items():
        if not isinstance(sources, dict):
            continue
        for name, found in sources.items():
            counts = {key: n for key, n in found.items() if n and key != "skipped"}
            skipped = {why: which for why, which in found.get("skipped", {}).items() if which}
            lines.append(f"\ndata      {stage}: {name}\n          {counts}")
            lines += [f"          skipped, {why}: {which}" for why, which in skipped.items()]
    return "\n".join(lines)


def _with_config_paths(args: list[str]) -> list[str]:
    """Replace a bare config name by its path in configs/."""
    found = list(args)
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if equals:
            found[i] = f"{flag}={find_config(value)}"
        elif i + 1 < len(args):
            found[i + 1] = str(find_config(args[i + 1]))
    return found
