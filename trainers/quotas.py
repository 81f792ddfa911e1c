"""Head quotas at the end of a training: what the heads just trained keep of training contexts.

Scores of different heads can be compared where all heads learned a logarithm of attention, so only
then; `python -m locret calibrate` measures quotas of any heads, on any texts.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from locret.commands.progress import Progress
from locret.engine.budgets import Calibration, why_not_calibrated
from locret.heads.heads import RetainingHeads
from locret.heads.quotas import checked_sharpness
from locret.policies import LocretPolicy


def check_measuring(quota_contexts: int, quota_sharpness: float) -> None:
    """Refuse (ValueError) settings by which no quotas can be measured."""
    if quota_contexts < 0:
        raise ValueError(f"quota_contexts is {quota_contexts}; expected 0 (none) or more")
    checked_sharpness(quota_sharpness)


def measured_quotas(
    trainer: Trainer, module: Any, heads: RetainingHeads
) -> dict[str, list[list[float]]] | None:
    """Quotas by compression, of mean 1, [layers][KV heads].

    Args:
        trainer: its data module draws the contexts: `contexts(count)`, token ids [n] each.
        module: the HeadsModule that was trained.
        heads: as they were exported.

    Returns:
        None where none are wanted or none can be measured.
    """
    count = module.hparams["quota_contexts"]
    if not count or not heads.config.learns_logarithm:
        return None
    reason = _why_not(module, heads)
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


def _why_not(module: Any, heads: RetainingHeads) -> str | None:
    if module.shards is not None:
        return (
            "the backbone is sharded over processes; python -m locret calibrate does it with the "
            "whole one"
        )
    return why_not_calibrated(LocretPolicy(heads))
