"""An adapter that learns to answer from what eviction leaves: KL(full || evicted).

The teacher is the model without the adapter, which sees all of its context. The student is the
model with the adapter, and each branch sees of its trunk the best units alone, by the scores of
frozen heads. Heads are tuned by the same divergence (`locret.training.gated`), but here trunks
change as well, so that gradients flow through the whole row; and a unit is there or not, as scores
learn nothing.

A row is read three times: by the teacher, by the student for scores (the best units of the whole
model are known after its last layer), and by the student with gradients.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from locret.heads.heads import RetainingHeads
from locret.heads.quotas import quotas_of
from locret.model.attend import Past
from locret.model.backbone import Backbone
from locret.model.backends import Backend
from locret.model.hooks import LayerCall, LayerFunction, without_autocast
from locret.model.varlen import Text, attend_texts
from locret.training.branch_reading import Trunks, unbiased, ways_of
from locret.training.distill import Distillation
from locret.training.divergence import Divergence, MeanOver, check_mean, divergence, recomputing
from locret.training.gated import Threshold, check_gates, check_samples, check_tunable, log_mask
from locret.training.row_loss import PackedAttention, slots_of
from locret.training.segments import Segment, check_segments


class EvictedLoss:
    """Divergence of answers that see what heads keep of their context, for rows of trunks with
    branches.

    Args:
        backbone: the student, a model that carries an adapter.
        heads: frozen, in float32 and on the backbone's device.
        teacher: until its block ends, the backbone is the teacher.
        threshold, mean_over: as of `locret.training.gated.GatedLoss`.
        recompute: layers keep their input alone for the backward pass; nothing may drop out then.

    Raises:
        ValueError: heads or a backbone that `locret.training.gated.GatedLoss` would refuse, an
            unknown name, or an adapter on the output layer, which teacher and student share.
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
        check_tunable(heads, threshold)
        check_mean(mean_over)
        check_gates(backbone.config)
        if any(p.requires_grad for p in backbone.model.get_output_embeddings().parameters()):
            raise ValueError(
                "the adapter is on the output layer too, which teacher and student share; leave it "
                "out of target_modules"
            )
        dtype = next(heads.parameters()).dtype
        recipe = Distillation(backbone, heads, alpha=0.0).recipe
        # In 16 bits many scores would be equal, and the first layers' would stay.
        self.recipe = replace(recipe, features=lambda call: recipe.features(call).to(dtype))
        self.backbone = backbone
        self.teacher = teacher
        self.quotas = quotas_of(heads.config.quotas if threshold == "quotas" else None)
        self.mean_over = mean_over
        self.recompute = recompute

    def __call__(
        self,
        input_ids: Tensor,
        segments: Sequence[Segment],
        compressions: Sequence[float],
        parameters: Sequence[nn.Parameter] = (),
    ) -> Divergence:
        """One row of samples.

        Args:
            input_ids: [1, N] long.
            segments: the samples in the row, in order, without gaps, each with branches.
            compressions: of each sample's trunk, at least 1 (all units stay).
            parameters: what gradients are taken of; none = no gradients.

        Raises:
            ValueError: as of `GatedLoss`.
        """
        check_segments(segments, input_ids.shape[1])
        check_samples(segments, compressions)
        asking = [way.asking for way in ways_of(segments)]
        at, counts = [token for each in asking for token in each], [len(each) for each in asking]
        with torch.no_grad():
            with self.teacher():
                full = self._read(input_ids, PackedAttention(segments, self.recipe.backend))[at]
            masks = self._masks(input_ids, segments, compressions)
        evicted = EvictedAttention(segments, masks, self.recipe.backend)
        layers = self.backbone.decoder.layers
        again = recomputing(layers) if self.recompute and parameters else contextlib.nullcontext()
        # Gradients are taken in here: layers that are computed again need what is attached.
        with again, self.backbone.attached(evicted), torch.set_grad_enabled(bool(parameters)):
            hidden = self._decoded(input_ids)[at]
            return divergence(self.backbone, full, hidden, counts, self.mean_over, parameters)

    def _masks(
        self, input_ids: Tensor, segments: Sequence[Segment], compressions: Sequence[float]
    ) -> list[Tensor]:
        """Which units the student keeps of each trunk, [L, H, P] as of `log_mask`."""
        trunks = Trunks(self.recipe, segments, learning=False)
        plain = PackedAttention(segments, self.recipe.backend)

        def layer(call: LayerCall) -> Tensor:
            trunks.add(call)
            return plain(call)

        with without_autocast(input_ids.device):
            self._read(input_ids, layer)
        pairs = zip(trunks.scores_of_segments(), compressions, strict=True)
        return [log_mask(each, r, self.quotas) for each, r in pairs]

    def _read(self, input_ids: Tensor, layer: LayerFunction) -> Tensor:
        with self.backbone.attached(layer):
            return self._decoded(input_ids)

    def _decoded(self, input_ids: Tensor) -> Tensor:
        """The decoder's output [N, hidden size]."""
        read = self.backbone.decoder(input_ids=input_ids, use_cache=False)
        hidden: Tensor = read.last_hidden_state
        return hidden[0]


class EvictedAttention:
    """A layer function: trunks attend to themselves, branches to themselves and to what is left of
    their trunk; gradients flow.

    Args:
        segments: what stands in the row, in order, without gaps.
        masks: for each segment, what is added to the logits of its trunk's units, [L, H, P].
        backend: `eager` or `sdpa`.
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
        output = attend_texts(query, texts, call.scaling, self.backend, call.weighting)
        return output[..., : call.query.shape[3]]
