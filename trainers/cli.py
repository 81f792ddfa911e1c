"""The command line that every training shares: LightningCLI, config names, output, resume.

A bare config name is looked up in configs/. Any value can be overridden on the command line
(`--model.lr 1e-3`, `--trainer.max_steps 100`); `--help` lists them all, `--print_config` shows what
would run. Ctrl-C is safe: `--ckpt_path last` goes on from the last checkpoint.
"""

import sys
import tempfile
import warnings
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

from datamodules.datamodule import ConversationDataModule

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class TrainingCLI(LightningCLI):
    """LightningCLI with an output folder and a checkpoint to resume from."""

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
    module: type[LightningModule], export: type[SaveConfigCallback], args: list[str] | None
) -> TrainingCLI:
    """Parse the command line (`args`, or the process's own) and make trainer, module and data."""
    # A run without validation data is no mistake.
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    return TrainingCLI(
        module,
        ConversationDataModule,
        run=False,
        args=args,
        save_config_callback=export,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
    )


def status(name: str, main: Callable[[], object]) -> int:
    """Run a training as a command: the exit status. Errors of the user print one line to stderr."""
    try:
        main()
    except (ValueError, OSError, MisconfigurationException) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def run(cli: TrainingCLI) -> Path:
    """Train, say what was made, and return its folder.

    Raises:
        ValueError: no output folder is given, or nothing can be written there.
    """
    output = _made(cli.config.output)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
    cli.datamodule.gather_counts()
    if cli.trainer.is_global_zero:
        figures = {name: round(float(v), 4) for name, v in cli.trainer.callback_metrics.items()}
        print(_data_table(cli.datamodule.report()))
        print(f"figures   {figures}")
        print(f"made      {output.resolve()}")
    return output


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
            found[i] = f"{flag}={config_path(value)}"
        elif i + 1 < len(args):
            found[i + 1] = str(config_path(args[i + 1]))
    return found


def config_path(name: str) -> Path:
    """The config file of this name: a path as it is, or a name in configs/, with or without .yaml.

    Raises:
        ValueError: no such file; lists the configs there are.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
    raise ValueError(f"config {name!r} is no file, here or in {CONFIGS}; there are: {known}")
