"""How contexts of policies that reread (`Policy.rereads`) are read: to the end without an eviction
(`FirstPass`), again for their scores (`SecondPass`), then evicted once. While that lasts, every
layer holds the whole context, as it came: keys unrotated at compact positions, because units will
move to other slots, and nothing packed, because what is evicted need not be.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from locret.cache.layer import RetainedLayer
from locret.cache.store import NewTokens
from locret.engine.attention import Pass, next_slots, own_positions, pasts_of, rectangle_of
from locret.engine.budgets import keep_highest
from locret.model.attend import attend_past
from locret.model.backends import Backend
from locret.model.hooks import LayerCall, without_autocast
from locret.policies.base import Policy


@dataclass(frozen=True)
class FirstPass(Pass):
    """Attend, and keep all new units but the last `drop`."""

    backend: Backend
    drop: int = 0
    stores_only: bool = False

    def attend(self, call: LayerCall, layer: RetainedLayer, wanted: bool) -> Tensor | None:
        with without_autocast(call.key.device):
            query, key = _rotated(call, layer)
            output = None
            if wanted:
                how = call.scaling, self.backend, call.weighting
                output = attend_past(query, pasts_of(call, layer), (key, call.value), *how)
            stored, own = key if layer.rotated else call.key, own_positions(call, layer)
            new = NewTokens.of(stored, call.value, own)
            layer.store.append(new.first(key.shape[2] - self.drop))
            return output


@dataclass(frozen=True)
class SecondPass(Pass):
    """Attend, let the policy look, and keep no new unit.

    Args:
        policy: scores units by what this reading attends to.
        looking: how many of the reading's last tokens look.
        scores: [B, H, n] float32 by layer, of readings so far; higher = keep.
    """

    policy: Policy
    backend: Backend
    looking: int
    scores: dict[int, Tensor]
    drop: int
    stores_only: bool

    def attend(self, call: LayerCall, layer: RetainedLayer, wanted: bool) -> Tensor | None:
        with without_autocast(call.key.device):
            query, key = _rotated(call, layer)
            pasts = pasts_of(call, layer)
            keys = torch.cat([rectangle_of(layer, pasts, "keys"), key], dim=2)
            values = torch.cat([rectangle_of(layer, pasts, "values"), call.value], dim=2)
            view = call.seen_by(query[:, :, -self.looking :], keys, values)
            assert call.retained_idx is not None
            keep_highest(self.scores, call.retained_idx, self.policy.look(view), layer.longest)
            if not wanted:
                return None
            how = call.scaling, self.backend, call.weighting
            return attend_past(query, pasts, (key, call.value), *how)


def _rotated(call: LayerCall, layer: RetainedLayer) -> tuple[Tensor, Tensor]:
    """Queries and keys of the new tokens at the next slots."""
    starts, lengths = next_slots(layer, call.cache), call.cache.prompt_lengths
    return call.rotate(call.query, starts, lengths), call.rotate(call.key, starts, lengths)
