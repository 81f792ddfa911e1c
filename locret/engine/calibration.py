"""Measure head quotas (`locret.heads.quotas`): which heads have the best units of whole contexts.

    calibration = Calibration(engine.backbone, engine.policy)
    for ids in contexts:
        calibration.add(ids)
    calibration.quotas()    # {"2": [layers][KV heads], "4": ...}

A context is read at once with plain causal attention. The policy ranks every unit of a layer as it
is read, or looks at it from what a policy that rereads has read behind it, and of the layer nothing
but these scores is kept. The best 1/r of all units of all layers
and heads would stay at compression r; a head's quota is its share of them, the mean over contexts.
So the policy's scores must be on one scale for all heads: those of heads trained on logarithms of
attention are, and a cosine is.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from locret.engine.passes import chunk_of
from locret.engine.rereading import keep_highest
from locret.heads.quotas import COMPRESSIONS, averaged, measured
from locret.model.backbone import Backbone
from locret.model.backends import Backend, attend
from locret.model.hooks import LayerCall
from locret.policies import LocretPolicy, Policy


class Calibration:
    """Collects what heads would keep of contexts.

    Args:
        backbone: of the model, attached to nothing.
        policy: ranks units.
        compressions: for which quotas are measured, at least 1 each.
        backend: of attention (`locret.model.attend`); None = as the model was loaded.

    Raises:
        ValueError: the policy's scores do not tell heads apart, or need what a context has not.
    """

    def __init__(
        self,
        backbone: Backbone,
        policy: Policy,
        compressions: Sequence[float] = COMPRESSIONS,
        backend: Backend | None = None,
    ) -> None:
        reason = why_not(policy)
        if reason is not None:
            raise ValueError(f"policy {policy.name!r} cannot be calibrated: {reason}")
        self.backbone = backbone
        self.policy = policy
        self.compressions = tuple(compressions)
        self.backend = backend or backbone.backend
        self._scores: dict[int, Tensor] = {}
        self._fractions: list[list[Tensor]] = []

    @torch.no_grad()
    def add(self, input_ids: Tensor) -> None:
        """Count the best units of a context, [1, T] long. ValueError: scores that are not
        finite."""
        self._scores = {}
        try:
            for ids, looking in self._readings(input_ids):
                layer = functools.partial(self._layer, input_ids.shape[1], looking)
                with self.backbone.attached(layer):
                    self.backbone.decoder(
                        input_ids=ids,
                        position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
                        use_cache=False,
                    )
            scores = [self._scores[layer] for layer in sorted(self._scores)]
            self._fractions.append(measured(scores, self.compressions))
        finally:
            self._scores = {}

    def _readings(self, context: Tensor) -> Iterator[tuple[Tensor, int]]:
        """What is read for the scores of a context, [1, T] long, and how many of the last tokens
        look at it; 0 = the policy ranks what is read."""
        if not self.policy.rereads:
            yield context, 0
            return
        for tokens, looking in self.policy.second_readings(context):
            yield torch.cat([context, tokens], dim=1), looking

    def quotas(self, sharpness: float = 1.0) -> dict[str, list[list[float]]]:
        """Quotas of mean 1 by compression, [layers][KV heads], of the contexts so far; `sharpness`
        as in `locret.heads.quotas.averaged`."""
        assert self._fractions, "no context was added yet"
        by_compression = zip(self.compressions, zip(*self._fractions, strict=True), strict=True)
        return {f"{compression:g}": averaged(of, sharpness) for compression, of in by_compression}

    def _layer(self, length: int, looking: int, call: LayerCall) -> Tensor:
        """The layer function: plain causal attention, and the policy's scores on the way.

        Args:
            length: tokens of the context.
            looking: see `_readings`.
        """
        tokens = (call.key.shape[2],)
        query, key = (call.rotate(x, (0,), tokens) for x in (call.query, call.key))
        i = call.retained_idx
        if i is not None:
            if looking:
                scores = self.policy.look(call.seen_by(query[:, :, -looking:], key, call.value))
            else:

                def rotate(x: Tensor, offset: int) -> Tensor:
                    return call.rotate(x, (offset,), tokens)

                chunk = chunk_of(call, query, key, start=0, rotate=rotate)
                scores = self.policy.rank(chunk).float()
            if not scores.isfinite().all():
                raise ValueError(
                    f"policy {self.policy.name!r} gave scores that are not finite numbers in layer "
                    f"{i}; expected finite ones, by which units can be compared"
                )
            keep_highest(self._scores, i, scores[0].cpu(), length)
        return attend(query, key, call.value, call.scaling, self.backend, weighting=call.weighting)


def why_not(policy: Policy | type[Policy]) -> str | None:
    """Why quotas cannot be measured by a policy's scores; None if they can."""
    if not policy.evicts:
        return "it keeps every unit"
    if policy.waits:
        return "it scores a token alike in all heads"
    core = policy.core if isinstance(policy, Policy) else None
    if isinstance(core, LocretPolicy) and core.heads.config.query_tokens:
        return "its heads read a question in front, which texts for calibration do not have"
    return None
