"""Heads tuned by what is lost without the units that they would evict: KL(full || gated).

The teacher is the model that sees everything. The student is the same frozen model, but each branch
sees the units of its trunk through soft gates, which the heads' scores open and close; of the two
predictions of every token of an answer the divergence is the loss. What gates cannot show, that
another unit would have done as well, regression on labels never could.

The row is read once, by the teacher, which leaves keys, values and scores of the trunks: no gate
changes them, as a trunk never sees its branches. So the student reads the branches' tokens alone,
and gradients flow through these alone, to the gates, and from there through the heads on features
that the teacher left. Nothing of a trunk is computed twice or in the backward pass; features of the
trunks stay in memory, 115 KB a token for Qwen2.5-Coder-1.5B in 16 bits (28 layers of 2,048).

    gate = sigmoid((score - threshold) / temperature)

A score at its threshold has gate 1/2; far above it 1, the unit is kept; far below it 0, the unit is
gone. The colder, the fewer units are in between. Thresholds are such that so many scores are above
them as a cache of that compression would keep.

A unit's gate is added as log(gate) to its logits, by further channels of its key, so that attention
is the fused one. Layers are computed again in the backward pass, and only answers meet the
vocabulary, a block of tokens at a time.

L layers with heads, H KV heads, P units of a trunk. Scores are [L, H, P]; higher = keep.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from locret.heads.heads import RetainingHeads, is_logarithm
from locret.heads.quotas import Quotas, quotas_of, unit_counts
from locret.heads.targets import BoundaryLoss, Loss
from locret.model.backbone import Backbone
from locret.model.hooks import LayerCall, LayerFunction
from locret.quantization import Quantization, scheme_of
from locret.training.branch_reading import BranchAttention, Trunks, Way, ways_of
from locret.training.distill import Distillation
from locret.training.divergence import Divergence, MeanOver, check_mean, divergence, recomputing
from locret.training.row_loss import Distilled, PackedAttention, RowLoss
from locret.training.segments import Segment, check_segments

Threshold = Literal["global", "quotas"]
"""One for all units of the model, or one a head, such that it keeps its quota."""

FLOOR = -20.0
"""Of a gate's logarithm: 2e-9 of the weight, and no infinity in any dtype."""


@dataclass
class Gated:
    """What one row of samples gave.

    Attributes:
        loss: scalar; its backward gives the heads their gradients, once.
        divergence: scalar, KL(full || gated) in nats, mean over the answers' tokens.
        agreement: scalar, for how many of these tokens both find the same one most likely, 0 to 1.
        opened: scalar, sum of all gates next to the units that stay: near 1 when they are cold.
        regression: scalar, the loss on labels; 0 where none are taken.
    """

    loss: Tensor
    divergence: Tensor
    agreement: Tensor
    opened: Tensor
    regression: Tensor


class GatedLoss:
    """Divergence of answers that see their context through gates, for rows of trunks with branches.

    Args:
        backbone: frozen; its parameters get no gradients and keep their mode.
        heads: what is trained; they learned a logarithm, so that scores are on one scale.
        threshold: "global", so that the best units of the whole model stay, or "quotas", so that
            every head keeps what its record says.
        mean_over: "tokens", or "branches": else copies of a context, which have the most tokens,
            outweigh the answers to questions; or "both": half of each mean.
        regression_weight: of the loss on labels, which keeps scores near logarithms of attention; 0
            takes no labels.
        loss, boundary_weight: of the loss on labels, see `Distillation`.
        quantization: how the trunk's keys and values are stored when branches see them
            (`locret.quantization`), all in blocks from the first on; gradients pass by it.
        recompute: layers keep their input alone for the backward pass.

    Raises:
        ValueError: heads that do not fit the backbone, did not learn a logarithm, read a question
            in front or have no quotas although these are asked for; a backbone that caps its
            logits; an unknown name; a weight below 0.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: RetainingHeads,
        *,
        threshold: Threshold = "global",
        mean_over: MeanOver = "tokens",
        regression_weight: float = 0.1,
        loss: str | Loss = "smooth_l1",
        boundary_weight: float = 0.2,
        quantization: Quantization = None,
        recompute: bool = True,
    ) -> None:
        check_tunable(heads, threshold)
        check_mean(mean_over)
        if not regression_weight >= 0:
            raise ValueError(f"regression_weight is {regression_weight}; expected 0 or more")
        check_gates(backbone.config)
        self.distillation = Distillation(
            backbone, heads, alpha=0.0, loss=loss, boundary_weight=boundary_weight
        )
        self.backbone = backbone
        self.heads = heads
        self.quotas = quotas_of(heads.config.quotas if threshold == "quotas" else None)
        self.mean_over = mean_over
        self.regression_weight = regression_weight
        self.scheme = scheme_of(quantization)
        self.recompute = recompute

    def __call__(
        self,
        input_ids: Tensor,
        segments: Sequence[Segment],
        compressions: Sequence[float],
        temperature: float,
    ) -> Gated:
        """One row of samples. Gradients are taken while the heads are in training mode.

        Args:
            input_ids: [1, N] long.
            segments: the samples in the row, in order, without gaps, each with branches.
            compressions: of each sample's trunk, at least 1 (all units stay).
            temperature: of the gates, above 0.

        Raises:
            ValueError: segments that do not fill the row or have no branches, another number of
                compressions than of segments, a compression below 1, a temperature of 0 or less.
        """
        check_segments(segments, input_ids.shape[1])
        check_samples(segments, compressions)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a number above 0")
        ways = ways_of(segments)
        trunks = Trunks(self.distillation.recipe, segments, self.scheme, self.heads.training)
        full, on_labels = self._teach(input_ids, segments, ways, trunks)
        with torch.set_grad_enabled(self.heads.training):
            gates, opened = self._gates(trunks, compressions, temperature)
            attention = BranchAttention(ways, trunks, gates, self.backbone.backend)
            lost = self._compare(input_ids, ways, attention, full)
            loss, regression = lost.loss, lost.loss.new_zeros(())
            if on_labels is not None:
                regression = on_labels.regression
                loss = loss + self.regression_weight * on_labels.loss
        return Gated(loss, lost.loss.detach(), lost.agreement, opened, regression)

    def _teach(
        self, input_ids: Tensor, segments: Sequence[Segment], ways: Sequence[Way], trunks: Trunks
    ) -> tuple[Tensor, Distilled | None]:
        """Read the row with everything in sight, and collect its trunks.

        Returns:
            The decoder's output [A, hidden size] of the tokens that predict answers, and the loss
            on labels.
        """
        recipe, decoder = self.distillation.recipe, self.backbone.decoder
        of_labels = RowLoss(recipe, segments) if self.regression_weight else None
        read: LayerFunction = PackedAttention(segments, recipe.backend)
        if of_labels is not None:
            read = of_labels.layer

        def layer(call: LayerCall) -> Tensor:
            trunks.add(call)
            return read(call)

        with torch.no_grad(), self.backbone.attached(layer):
            hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state[0]
        if isinstance(recipe.loss, BoundaryLoss):
            recipe.loss.end_row()
        at = [token for way in ways for token in way.asking]
        return hidden[at], None if of_labels is None else of_labels.result()

    def _gates(
        self, trunks: Trunks, compressions: Sequence[float], temperature: float
    ) -> tuple[list[Tensor], Tensor]:
        """Logarithms of each trunk's gates, [L, H, P], and how much they are open: see `Gated`."""
        gates, opened = [], []
        pairs = zip(trunks.scores_of_segments(), compressions, strict=True)
        for scores, compression in pairs:
            thresholds = thresholds_for(scores.detach(), compression, self.quotas)
            gates.append(log_gates(scores, thresholds, temperature))
            opened.append(gates[-1].detach().exp().mean() * compression)
        return gates, torch.stack(opened).mean()

    def _compare(
        self, input_ids: Tensor, ways: Sequence[Way], attention: BranchAttention, full: Tensor
    ) -> Divergence:
        """Read the branches through the gates, next to what they were without them."""
        backbone, learning = self.backbone, self.heads.training
        ids = torch.cat([input_ids[:, way.stretch.start : way.stretch.end] for way in ways], dim=1)
        at = [token + way.shift for way in ways for token in way.asking]
        counts = [len(way.asking) for way in ways]
        again = recomputing(backbone.decoder.layers) if self.recompute and learning else None
        parameters = [p for p in self.heads.parameters() if learning and p.requires_grad]
        # Gradients are taken in here: layers that are computed again need what is attached.
        with again or contextlib.nullcontext(), backbone.attached(attention):
            hidden = backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, at]
            return divergence(backbone, full, hidden, counts, self.mean_over, parameters)


def check_tunable(heads: RetainingHeads, threshold: Threshold) -> None:
    """Refuse heads that cannot be tuned through gates. ValueError: says why not, and what to do."""
    config = heads.config
    check_tunable_as(config.label, config.query_tokens, config.quotas is not None, threshold)


def check_tunable_as(
    label: str, query_tokens: int, with_quotas: bool, threshold: Threshold
) -> None:
    """As `check_tunable`, of what heads that are not trained yet will record."""
    if not is_logarithm(label):
        raise ValueError(
            f"these heads learned {label!r}, and scores of different heads are compared "
            "here: train them with a label that is a logarithm, such as log_max_prob"
        )
    if query_tokens:
        raise ValueError(
            f"these heads read {query_tokens} tokens of a question in front of the context, "
            "which a context with several branches has not; expected heads with query_tokens 0"
        )
    if threshold not in get_args(Threshold):
        raise ValueError(f"threshold is {threshold!r}; expected one of {get_args(Threshold)}")
    if threshold == "quotas" and not with_quotas:
        raise ValueError(
            "threshold is 'quotas' and the heads have none in their record: measure them with "
            "python -m locret calibrate, or choose 'global'"
        )


def check_gates(config: Any) -> None:
    """Refuse (ValueError) a backbone of this config if its attention takes no gates."""
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        raise ValueError(
            f"{config.model_type} caps its logits, and a gate is a term of the logits "
            "before the cap; train heads for it by regression alone (trainers.fit)"
        )


def check_samples(segments: Sequence[Segment], compressions: Sequence[float]) -> None:
    """Refuse (ValueError) samples without branches, or compressions that are not theirs."""
    plain = sum(not segment.branches for segment in segments)
    if plain:
        raise ValueError(
            f"{plain} of {len(segments)} samples have no branches; make samples with branches "
            "(data.branches)"
        )
    if len(compressions) != len(segments) or not all(each >= 1 for each in compressions):
        raise ValueError(
            f"compressions are {list(compressions)} for {len(segments)} samples; expected a number "
            "of at least 1 for each"
        )


def thresholds_for(scores: Tensor, compression: float, quotas: Quotas | None = None) -> Tensor:
    """Between the scores of the units that stay and those of the others.

    Args:
        scores: without gradients.
        compression: 1 / so much of all units stays, at least one; 1 = all.
        quotas: how many units each head keeps; None = the best of all heads and layers.

    Returns:
        [1, 1, 1] or, with quotas, [L, H, 1]; -inf where all units stay.
    """
    best_first = _compared(scores, quotas).sort(dim=-1, descending=True).values
    kept = _kept(scores, compression, quotas)
    last = best_first.shape[-1] - 1
    # The middle of the last score that is kept and the first that is not.
    middle = (best_first.gather(-1, kept - 1) + best_first.gather(-1, kept.clamp(max=last))) / 2
    return middle.masked_fill(kept > last, -torch.inf)


def log_mask(scores: Tensor, compression: float, quotas: Quotas | None = None) -> Tensor:
    """Logarithms of gates that are as cold as can be: 0 where a unit stays, `FLOOR` elsewhere, like
    the scores. Of equal scores the first stay: the same tokens have the same in a first layer.

    Args: as of `thresholds_for`.
    """
    compared = _compared(scores, quotas)
    place = compared.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    gone = place >= _kept(scores, compression, quotas)
    return torch.zeros_like(compared).masked_fill(gone, FLOOR).view_as(scores)


def _compared(scores: Tensor, quotas: Quotas | None) -> Tensor:
    """Scores with those of which the best stay along the last axis: a head's, or all, [1, 1, *]."""
    return scores.reshape(1, 1, -1) if quotas is None else scores


def _kept(scores: Tensor, compression: float, quotas: Quotas | None) -> Tensor:
    """How many of them stay, [1, 1, 1] or [L, H, 1]."""
    if quotas is None:
        kept = max(1, round(scores.numel() / compression))
        return torch.tensor([[[kept]]], device=scores.device)
    units = scores.shape[-1]
    budget = max(1, round(units / compression))
    counts = unit_counts(quotas.at(compression), budget, units)
    return torch.tensor(counts, device=scores.device)[..., None]


def log_gates(scores: Tensor, thresholds: Tensor, temperature: float) -> Tensor:
    """Logarithms of gates, from `FLOOR` to 0.

    The threshold follows the scores near it: how many units stay is given, so a change that lifts
    all scores of a threshold alike opens no gate, and its gradient is zero. Without this, what all
    heads have in common, to keep more, would hide in what they differ.

    Args:
        scores: with gradients.
        thresholds: as of `thresholds_for`.
        temperature: above 0, in the scores' unit.
    """
    with torch.no_grad():
        gates = ((scores - thresholds) / temperature).sigmoid()
        near = gates * (1 - gates)
        total = near.sum_to_size(thresholds.shape).clamp(min=torch.finfo(near.dtype).tiny)
    mean = (near / total * scores).sum_to_size(thresholds.shape)
    moving = thresholds + (mean - mean.detach())
    return logsigmoid((scores - moving) / temperature).clamp(min=FLOOR)
