"""Losses on what answers lose of their context: KL(full || gated) for heads, KL(full || evicted)
for an adapter, in rows of trunks with branches.

The teacher is the model that sees everything. For heads, the student is the same frozen model, but
each branch sees the units of its trunk through soft gates, which the heads' scores open and close;
of the two predictions of every token of an answer the divergence is the loss. What gates cannot
show, that another unit would have done as well, regression on labels never could.

The row is read once, by the teacher, which leaves keys, values and scores of the trunks: no gate
changes them, as a trunk never sees its branches. So the student reads the branches' tokens alone,
and gradients flow through these alone, to the gates, and from there through the heads on features
that the teacher left. Nothing of a trunk is computed twice or in the backward pass; features of the
trunks stay in memory, 115 KB a token for Qwen2.5-Coder-1.5B in 16 bits (28 layers of 2,048).

For an adapter, the teacher is the model without it, and the student the model with it, where each
branch sees of its trunk the best units alone, by the scores of frozen heads. Here trunks change as
well, so that gradients flow through the whole row; and a unit is there or not, as scores learn
nothing. A row is read three times: by the teacher, by the student for scores (the best units of the
whole model are known after its last layer), and by the student with gradients.

L layers with heads, H KV heads, P units of a trunk. Scores are [L, H, P]; higher = keep.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from locret.heads.heads import RetainingHeads, is_logarithm
from locret.heads.quotas import quotas_of
from locret.heads.targets import BoundaryLoss, Loss
from locret.model.attend import Past
from locret.model.backbone import Backbone, is_softcapped
from locret.model.backends import Backend
from locret.model.hooks import LayerCall, LayerFunction, without_autocast
from locret.model.prenorm import read_whole
from locret.model.varlen import Text, attend_texts
from locret.model.weights import check_has_gradients
from locret.quantization import Quantization, scheme_of
from locret.training.branches import (
    BranchAttention,
    Divergence,
    MeanOver,
    Trunks,
    divergence,
    log_gates,
    log_mask,
    recomputing,
    thresholds_for,
    unbiased,
)
from locret.training.distill import Distillation
from locret.training.row_loss import Distilled, PackedAttention, RowLoss
from locret.training.segments import Segment, Way, check_segments, slots_of, ways_of

Threshold = Literal["global", "quotas"]
"""One for all units of the model, or one a head, such that it keeps its quota."""


@dataclass
class Gated:
    """What one row of samples gave.

    Attributes:
        loss: scalar; its backward gives the heads their gradients, once.
        divergence: scalar, KL(full || gated) in nats, mean over the answers' tokens.
        agreement: scalar, for how many of these tokens both find the same one most likely, 0 to 1.
        regression: scalar, the loss on labels; 0 where none are taken.
        opened: scalar, sum of all gates next to the units that stay: near 1 when they are cold.
    """

    loss: Tensor
    divergence: Tensor
    agreement: Tensor
    regression: Tensor
    opened: Tensor


class _BranchLoss:
    """What the losses of rows of trunks with branches share; arguments as of `GatedLoss`."""

    def __init__(
        self,
        backbone: Backbone,
        heads: RetainingHeads,
        threshold: Threshold,
        mean_over: MeanOver,
        recompute: bool,
        **of_labels: Any,
    ) -> None:
        check_tunable(heads, threshold)
        if mean_over not in get_args(MeanOver):
            raise ValueError(f"mean_over is {mean_over!r}; expected one of {get_args(MeanOver)}")
        check_gates(backbone.config)
        check_has_gradients(backbone.model)
        self.backbone = backbone
        self.heads = heads
        self.distillation = Distillation(backbone, heads, alpha=0.0, **of_labels)
        self.recipe = self.distillation.recipe
        self.quotas = quotas_of(heads.config.quotas if threshold == "quotas" else None)
        self.mean_over = mean_over
        self.recompute = recompute

    def _read(self, input_ids: Tensor, layer: LayerFunction, at: Sequence[int] = ()) -> Tensor:
        """The decoder's output [A, hidden size] of the tokens `at`, without gradients."""
        with self.backbone.attached(layer):
            hidden = read_whole(self.backbone, input_ids, layer).hidden
        assert hidden is not None
        return hidden[0, list(at)]

    def _compare(
        self,
        input_ids: Tensor,
        layer: LayerFunction,
        asking: Sequence[Sequence[int]],
        full: Tensor,
        parameters: Sequence[nn.Parameter],
    ) -> Divergence:
        """What the student predicts at the tokens `asking` of each answer, next to the teacher's
        output of these, `full`."""
        at, counts = [token for each in asking for token in each], [len(each) for each in asking]
        layers = self.backbone.decoder.layers
        again = recomputing(layers) if self.recompute and parameters else contextlib.nullcontext()
        # Gradients are taken in here: layers that are computed again need what is attached.
        with again, self.backbone.attached(layer), torch.set_grad_enabled(bool(parameters)):
            read = self.backbone.decoder(input_ids=input_ids, use_cache=False)
            hidden = read.last_hidden_state[0, at]
            return divergence(self.backbone, full, hidden, counts, self.mean_over, parameters)


class GatedLoss(_BranchLoss):
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
            logits, or computes products in FP8; an unknown name; a weight below 0.
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
        of_labels: dict[str, Any] = {"loss": loss, "boundary_weight": boundary_weight}
        super().__init__(backbone, heads, threshold, mean_over, recompute, **of_labels)
        if not regression_weight >= 0:
            raise ValueError(f"regression_weight is {regression_weight}; expected 0 or more")
        self.regression_weight = regression_weight
        self.scheme = scheme_of(quantization)

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
        ways, learning = ways_of(segments), self.heads.training
        trunks = Trunks(self.recipe, segments, self.scheme, learning)
        full, on_labels = self._teach(input_ids, trunks, ways)
        ids = torch.cat([input_ids[:, way.stretch.start : way.stretch.end] for way in ways], dim=1)
        asking = [[token + way.shift for token in way.asking] for way in ways]
        parameters = [p for p in self.heads.parameters() if learning and p.requires_grad]
        with torch.set_grad_enabled(learning):
            gates, opened = self._gates(trunks, compressions, temperature)
            attention = BranchAttention(ways, trunks, gates, self.recipe.backend)
            lost = self._compare(ids, attention, asking, full, parameters)
            loss, regression = lost.loss, lost.loss.new_zeros(())
            if on_labels is not None:
                regression = on_labels.regression
                loss = loss + self.regression_weight * on_labels.loss
        return Gated(loss, lost.loss.detach(), lost.agreement, regression, opened)

    def _teach(
        self, input_ids: Tensor, trunks: Trunks, ways: Sequence[Way]
    ) -> tuple[Tensor, Distilled | None]:
        """Read the row with everything in sight, and collect its trunks: the decoder's output of
        the tokens that predict answers, and the loss on labels."""
        of_labels = RowLoss(self.recipe, trunks.segments) if self.regression_weight else None
        read: LayerFunction = PackedAttention(trunks.segments, self.recipe.backend)
        if of_labels is not None:
            read = of_labels.layer
        at = [token for way in ways for token in way.asking]
        with torch.no_grad():
            full = self._read(input_ids, trunks.collecting(read), at)
        if isinstance(self.recipe.loss, BoundaryLoss):
            self.recipe.loss.end_row()
        return full, None if of_labels is None else of_labels.result()

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


class EvictedLoss(_BranchLoss):
    """Divergence of answers that see what heads keep of their context, for rows of trunks with
    branches.

    Args:
        backbone: the student, a model that carries an adapter.
        heads: frozen, in float32 and on the backbone's device.
        teacher: until its block ends, the backbone is the teacher.
        threshold, mean_over: as of `GatedLoss`.
        recompute: layers keep their input alone for the backward pass; nothing may drop out then.

    Raises:
        ValueError: heads or a backbone that `GatedLoss` would refuse, an unknown name, or an
            adapter on the output layer, which teacher and student share.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: RetainingHeads,
        teacher: Callable[[], AbstractContextManager[object]],
        *,
        threshold: Threshold = "global",
        mean_over: MeanOver = "tokens",
        recompute: bool = True,
    ) -> None:
        super().__init__(backbone, heads, threshold, mean_over, recompute)
        if any(p.requires_grad for p in backbone.model.get_output_embeddings().parameters()):
            raise ValueError(
                "the adapter is on the output layer too, which teacher and student share; leave it "
                "out of target_modules"
            )
        dtype, features = next(heads.parameters()).dtype, self.recipe.features
        # In 16 bits many scores would be equal, and the first layers' would stay.
        self.recipe = replace(self.recipe, features=lambda call: features(call).to(dtype))
        self.teacher = teacher

    def __call__(
        self,
        input_ids: Tensor,
        segments: Sequence[Segment],
        compressions: Sequence[float],
        parameters: Sequence[nn.Parameter] = (),
    ) -> Divergence:
        """One row of samples, as of `GatedLoss`.

        Args:
            parameters: what gradients are taken of; none = no gradients.
        """
        check_segments(segments, input_ids.shape[1])
        check_samples(segments, compressions)
        asking = [way.asking for way in ways_of(segments)]
        plain = PackedAttention(segments, self.recipe.backend)
        with torch.no_grad():
            with self.teacher():
                full = self._read(input_ids, plain, [token for each in asking for token in each])
            masks = self._masks(input_ids, segments, compressions)
        evicted = EvictedAttention(segments, masks, self.recipe.backend)
        return self._compare(input_ids, evicted, asking, full, parameters)

    def _masks(
        self, input_ids: Tensor, segments: Sequence[Segment], compressions: Sequence[float]
    ) -> list[Tensor]:
        """Which units the student keeps of each trunk, [L, H, P] as of `log_mask`."""
        trunks = Trunks(self.recipe, segments, learning=False)
        plain = PackedAttention(segments, self.recipe.backend)
        with without_autocast(input_ids.device):
            self._read(input_ids, trunks.collecting(plain))
        pairs = zip(trunks.scores_of_segments(), compressions, strict=True)
        return [log_mask(scores, r, self.quotas) for scores, r in pairs]


class EvictedAttention:
    """A layer function: trunks attend to themselves, branches to themselves and to what is left of
    their trunk; gradients flow.

    Args:
        segments: what stands in the row, in order, without gaps.
        masks: for each segment, what is added to the logits of its trunk's units, [L, H, P].
    """

    def __init__(
        self, segments: Sequence[Segment], masks: Sequence[Tensor], backend: Backend
    ) -> None:
        self.stretches = [stretch for segment in segments for stretch in segment.stretches]
        # Of the whole row, as that is one tensor: nobody sees a branch through a mask.
        rest = [segment.end - segment.last_prompt_end for segment in segments]
        self.mask = torch.cat(
            [pad(mask, (0, n)) for mask, n in zip(masks, rest, strict=True)], dim=-1
        )
        self.slots = slots_of(segments)
        self.backend = backend

    def __call__(self, call: LayerCall) -> Tensor:
        query, key = (call.rotate_ranges(x, self.slots) for x in (call.query, call.key))
        past = Past(key, call.value)
        if call.retained_idx is not None:
            past = past._replace(bias=self.mask[call.retained_idx][None])
        query, masked, new = unbiased(query, past, (key, call.value), call.scaling)
        texts = []
        for stretch in self.stretches:
            own, trunk = slice(stretch.start, stretch.end), slice(*stretch.trunk)
            pieces = ((m[:, :, trunk], n[:, :, own]) for m, n in zip(masked, new, strict=True))
            texts.append(Text(stretch.end - stretch.start, *pieces))
        output, _ = attend_texts(query, texts, call.scaling, self.backend, call.weighting)
        return output[..., : call.query.shape[3]]


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
    if is_softcapped(config):
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
