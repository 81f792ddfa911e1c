"""Callbacks of every training: what it leaves behind, how it is stopped, how far it is.

A training leaves its result, the resolved config and a picture of the run. It stops on SIGINT or
SIGTERM between two steps, and says how to go on: while it trains, a signal is noted and obeyed
before the next step. An exception at once could be lost in some `__del__`, such as that of the
processes that load data; and of several processes those would wait for ever that reach a
collective which another one never does.
"""

import contextlib
import importlib.util
import math
import shlex
import signal
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import distributed

from locret.commands.progress import Progress
from locret.engine.budgets import Calibration, why_not_calibrated
from locret.evaluation.questions import source
from locret.heads.files import save_record, write_card, written_aside
from locret.heads.heads import RetainingHeads
from locret.policies import LocretPolicy
from locret.system.files import as_json
from locret.system.interrupts import Repeats, Stopped, handlers, stop_behind

EVICTION = "eviction.json"
TRAINING_CONFIG = "training.yaml"
TRAINING_PLOT = "training.png"


class Export(SaveConfigCallback):
    """Writes what was trained to the config's `output` when training ends.

    LightningCLI hands it the parser and the resolved config, which it also saves in the log folder
    when training starts. For the picture it remembers the figures of all steps that were logged,
    over resumes too.
    """

    plotted: tuple[str, ...] = ("train/loss",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history: dict[str, list[float]] = {name: [] for name in ("step", *self.plotted)}
        self.written = False

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @abstractmethod
    def export(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """Write the result into `folder`."""

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.datamodule.count(batch)  # type: ignore[attr-defined]
        if pl_module.figures:
            self.history["step"].append(trainer.global_step)
            for name in self.plotted:
                self.history[name].append(float(pl_module.figures[name]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all that is left behind."""
        self._write(trainer, pl_module)
        self.written = True

    @rank_zero_only
    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.export(trainer, pl_module, self.folder)
        command = f"# command: {shlex.join(['python', *sys.orig_argv[1:]])}\n"
        text = command + self.parser.dump(self.config, skip_none=False)
        with written_aside(self.folder) as aside:
            (aside / TRAINING_CONFIG).write_text(text, encoding="utf-8")
            if importlib.util.find_spec("matplotlib") is None:
                rank_zero_warn("no picture of the run: pip install matplotlib")
            else:
                layers = getattr(pl_module, "layer_overlap", None)
                overlaps = () if layers is None else layers.tolist()
                _draw(aside / TRAINING_PLOT, self.history, overlaps)
        self.finish(trainer, pl_module, self.folder)

    def finish(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """What is left to do when everything lies in the folder."""


class ExportHeads(Export):
    """Writes the heads artifact, and into its record the quotas measured with these heads."""

    plotted = ("train/loss", "train/top10_overlap")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        longest = trainer.strategy.reduce(pl_module.longest_prompt, reduce_op="max")
        pl_module.longest_prompt.copy_(longest)
        super().on_train_end(trainer, pl_module)

    def export(self, trainer: Trainer, pl_module: Any, folder: Path) -> None:
        pl_module.trained_heads().save_pretrained(folder)

    def finish(self, trainer: Trainer, pl_module: Any, folder: Path) -> None:
        write_card(folder)  # once more, now that it can tell of the training
        # Last: the heads are safe by now, should this be stopped or run out of memory.
        heads = RetainingHeads.from_pretrained(folder)
        quotas = _measured_quotas(trainer, pl_module, heads)
        if quotas is not None:
            save_record(folder, replace(heads.config, quotas=quotas).to_dict())


class ExportTunedHeads(ExportHeads):
    """The same for heads that were tuned through gates, with the figures of such a training."""

    plotted = ("train/divergence", "train/agreement")


class ExportAdapter(Export):
    """Writes the adapter in PEFT's format, in bfloat16, and beside it, with which heads it was
    trained, if it was."""

    @property
    def plotted(self) -> tuple[str, ...]:  # type: ignore[override]
        with_heads = self.config.model.heads is not None
        return "train/loss", "train/agreement" if with_heads else "train/token_accuracy"

    def export(self, trainer: Trainer, pl_module: Any, folder: Path) -> None:
        adapted = pl_module.adapted
        # By name: where the weights lay when they were trained is nobody's business.
        adapted.peft_config["default"].base_model_name_or_path = pl_module.hparams["model"]
        state = {
            name: tensor.to(torch.bfloat16)
            for name, tensor in adapted.state_dict().items()
            if "lora_" in name
        }
        with written_aside(folder) as aside:
            adapted.save_pretrained(aside, state_dict=state, selected_adapters=["default"])
            if pl_module.hparams["heads"] is not None:
                names = ("compressions", "threshold")
                record = {"heads": source(pl_module.hparams["heads"])}
                record |= {name: pl_module.hparams[name] for name in names}
                (aside / EVICTION).write_text(as_json(record), encoding="utf-8")


def _measured_quotas(
    trainer: Trainer, module: Any, heads: RetainingHeads
) -> dict[str, list[list[float]]] | None:
    """Quotas by compression, of mean 1, [layers][KV heads]: what the heads just trained keep of
    training contexts; None where none are wanted or none can be measured.

    Scores of different heads can be compared where all heads learned a logarithm of attention, so
    only then; `python -m locret calibrate` measures quotas of any heads, on any texts.
    """
    count = module.hparams["quota_contexts"]
    if not count or not heads.config.learns_logarithm:
        return None
    reason = why_not_calibrated(LocretPolicy(heads))
    if module.shards is not None:
        reason = (
            "the backbone is sharded over processes; python -m locret calibrate does it with the "
            "whole one"
        )
    if reason is not None:
        rank_zero_warn(f"no head quotas were measured: {reason}")
        return None
    backbone = module.backbone
    device = next(backbone.decoder.parameters()).device
    calibration = Calibration(backbone, LocretPolicy(heads.to(device, backbone.model.dtype)))
    contexts = trainer.datamodule.contexts(count)  # type: ignore[attr-defined]
    with Progress("measuring head quotas", "contexts") as progress:
        for done, ids in enumerate(contexts):
            progress(done, count)
            calibration.add(ids[None].to(device))
        progress(count, count)
    return calibration.quotas(module.hparams["quota_sharpness"])


def _draw(path: Path, history: Mapping[str, Sequence[float]], layers: Sequence[float]) -> None:
    """Write a PNG.

    Args:
        path: where to.
        history: `step`, and the values of each metric at these steps.
        layers: the overlap of each layer at the end; empty = no such panel.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none may be there
    from matplotlib import pyplot

    metrics = [name for name in history if name != "step"]
    panels = len(metrics) + bool(layers)
    figure, axes = pyplot.subplots(1, panels, figsize=(4 * panels, 3), squeeze=False)
    for axis, name in zip(axes[0], metrics, strict=False):
        axis.plot(history["step"], history[name], linewidth=0.8, alpha=0.4)
        axis.plot(history["step"], _smooth(history[name]), linewidth=1.5)
        axis.set(title=name, xlabel="step")
    if layers:
        axes[0][-1].bar(range(len(layers)), layers)
        axes[0][-1].set(title="top-10% overlap at the end", xlabel="layer", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average."""
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else weight * smooth[-1] + (1 - weight) * value)
    return smooth


# ---- how it is stopped, how far it is ------------------------------------------------------------


class StopBetweenSteps(Callback):
    """Stops a training, all its processes before the same step, if any of them got a signal."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that came
        self._repeats = Repeats()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over from Lightning's handler, whose broadcast may meet any other collective. When
        training ends, Lightning puts back what was there before."""
        for number in handlers():
            signal.signal(number, self._note)

    on_sanity_check_start = on_train_start

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        number = self._of_all(pl_module) if trainer.world_size > 1 else self.number
        if number:
            raise Stopped(number)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.number and trainer.world_size == 1:  # several may have unequally many batches
            raise Stopped(self.number)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the processes that Lightning has started: they would wait for this one for ever."""
        children = getattr(trainer.strategy.launcher, "procs", [])
        started = list(children)
        children.clear()  # those that Lightning watches: it kills this process when one ends
        for child in started:
            child.kill()
        for child in started:  # of subprocess, or of multiprocessing
            child.wait() if isinstance(child, subprocess.Popen) else child.join()

    def _of_all(self, pl_module: LightningModule) -> int:
        number = torch.tensor(self.number, device=pl_module.device)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
        return int(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._repeats():
            return
        if self.number:  # the next step may never come
            raise Stopped(number)
        self.number = number


def signal_behind(error: BaseException, trainer: Trainer) -> int | None:
    """The number of the signal that an exception comes from, if it does. A signal that also ends
    data loaders shows here as their error, before the next step."""
    stop = stop_behind(error)
    if stop is not None:
        return stop.number
    noted = [c.number for c in trainer.callbacks if isinstance(c, StopBetweenSteps)]
    return next(filter(None, noted), None)


def where_it_stopped(trainer: Trainer, ckpt_path: str | None) -> str:
    """What to tell the user: the step, and the checkpoint to go on from; empty in all processes but
    the first.

    Args:
        ckpt_path: that the training itself went on from.
    """
    if not trainer.is_global_zero:
        return ""
    found = _checkpoint(trainer, ckpt_path)
    how = "nothing was saved yet" if found is None else f"go on with --ckpt_path {found}"
    saved = max(
        (getattr(c, "_last_global_step_saved", 0) for c in trainer.checkpoint_callbacks), default=0
    )
    if found is not None and 0 < saved < trainer.global_step:
        how += f", from step {saved}"
    return f"stopped at step {trainer.global_step}; {how}"


def _checkpoint(trainer: Trainer, ckpt_path: str | None) -> str | None:
    """The latest checkpoint of this training, as `--ckpt_path` takes it. Files that an earlier
    training left in the same folder do not count."""
    callbacks = trainer.checkpoint_callbacks
    if any(_exists(getattr(callback, "last_model_path", "")) for callback in callbacks):
        return "last"
    saved = [getattr(callback, "best_model_path", "") for callback in callbacks]
    found = filter(_exists, [*saved, ckpt_path or ""])
    return max(found, key=lambda path: get_filesystem(path).modified(path), default=None)


def _exists(path: str) -> bool:
    return bool(path) and bool(get_filesystem(path).exists(path))


class PlainProgress(Callback):
    """A line every few seconds on stderr, of the first process alone; nothing on a terminal."""

    def __init__(self) -> None:
        self._progress = Progress("training", "steps")
        self._watched = contextlib.ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Data and the first step may take long."""
        if trainer.is_global_zero and not sys.stderr.isatty():
            self._watched.enter_context(self._progress)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        steps = trainer.estimated_stepping_batches
        # A training without an end has no share that is done.
        if trainer.is_global_zero and not sys.stderr.isatty() and math.isfinite(steps):
            self._progress(trainer.global_step, int(steps))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._watched.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._watched.close()
