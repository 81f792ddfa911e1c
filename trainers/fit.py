"""Train retaining heads: `python -m trainers.fit --config smollm2.yaml`.

A bare config name is looked up in configs/. Any value can be overridden on the command line
(`--model.lr 1e-3`, `--trainer.max_steps 100`); `--help` lists them all, `--print_config` shows what
would run. Ctrl-C is safe: `--ckpt_path last` goes on from the last checkpoint.
"""

import sys
import warnings
from pathlib import Path

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from datamodules.datamodule import ConversationDataModule
from trainers.callbacks import ExportHeads
from trainers.module import HeadsModule

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class FitCLI(LightningCLI):
    """LightningCLI with an output folder and a checkpoint to resume from."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, help="folder for the trained heads")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume: path or last"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = sys.argv[1:] if args is None else args
        assert isinstance(given, list)
        self.config = parser.parse_args(_with_config_paths(given))


def main(args: list[str] | None = None) -> Path:
    """Run a training; returns the folder of the artifact."""
    # A run without validation data is no mistake.
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    cli = FitCLI(
        HeadsModule,
        ConversationDataModule,
        run=False,
        args=args,
        save_config_callback=ExportHeads,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
    )
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
    output = Path(cli.config.output)
    if cli.trainer.is_global_zero:
        _say_what_was_made(cli, output)
    return output


def _with_config_paths(args: list[str]) -> list[str]:
    """Replace a bare config name by its path in configs/.

    Raises:
        ValueError: no such file; lists the configs there are.
    """
    found = list(args)
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if equals:
            found[i] = f"{flag}={_config_path(value)}"
        elif i + 1 < len(args):
            found[i + 1] = str(_config_path(args[i + 1]))
    return found


def _config_path(name: str) -> Path:
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
    raise ValueError(f"config {name!r} is no file, here or in {CONFIGS}; there are: {known}")


def _say_what_was_made(cli: FitCLI, output: Path) -> None:
    figures = {name: round(float(v), 4) for name, v in cli.trainer.callback_metrics.items()}
    print(f"\ndata      {cli.datamodule.report()}")
    print(f"figures   {figures}")
    print(f"heads     {output.resolve()}")
    print(f"next      python -m locret generate --model {cli.model.hparams['model']}", end=" ")
    print(f"--heads {output} --prompt-file FILE")


if __name__ == "__main__":
    main()
