"""What a policy is: a rule that says which cache units to keep. One method makes a policy.

B batch, H KV heads, G query heads a KV head, S units held, T new tokens, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeldUnits:
    """The units that a layer held before the chunk came.

    Attributes:
        keys: [B, H, S, D], rotated at their slots.
        values: [B, H, S, D].
        scores: [B, H, S] float32, as the policy left them; higher = keep.
        positions: [B, H, S] long, source positions.
    """

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor


@dataclass(frozen=True)
class LayerChunk:
    """What a policy sees of one chunk in one layer.

    Attributes:
        layer_idx: the layer, counted among those that a budget holds for: layers with a sliding
            window bound their cache by themselves.
        query: [B, H*G, T, D], before RoPE.
        key, value: [B, H, T, D], the new units', before RoPE.
        hidden: [B, T, hidden size], the attention layer's input.
        start: source position of the first new token; the others follow.
        scaling: the layer's softmax scale.
        rotated_query, rotated_key: `query` and `key` rotated at their slots.
        held: the units held before; None = none.
        state: what the policy remembers of this layer and request, by name; [B, ...] tensors. The
            only place for it: a policy object serves many requests.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    start: int
    scaling: float
    rotated_query: Tensor
    rotated_key: Tensor
    held: HeldUnits | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        """Source positions of the new tokens, [T] long."""
        return torch.arange(self.start, self.start + self.key.shape[2], device=self.key.device)

    def all_keys(self) -> Tensor:
        """Rotated keys of held and new units, [B, H, S + T, D]."""
        if self.held is None:
            return self.rotated_key
        return torch.cat([self.held.keys, self.rotated_key], dim=2)

    def all_values(self) -> Tensor:
        """Values of held and new units, [B, H, S + T, D]."""
        return self.value if self.held is None else torch.cat([self.held.values, self.value], dim=2)

    def all_positions(self) -> Tensor:
        """Source positions of held and new units, [B, H, S + T] long."""
        new = self.positions.expand(self.key.shape[:3])
        return new if self.held is None else torch.cat([self.held.positions, new], dim=2)


class Policy:
    """Ranks units. Subclasses implement `score` (most need nothing else) or `rank`."""

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    """False: the policy keeps every unit, and a budget has no effect."""

    def score(self, chunk: LayerChunk) -> Tensor:
        """Finite scores [B, H, T] of the chunk's units, given once; higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must implement score()")

    def rank(self, chunk: LayerChunk) -> Tensor:
        """Finite scores [B, H, S + T] of held and new units, after every chunk; higher = keep.

        Policies whose scores of old units change override it; what it returns becomes
        `chunk.held.scores` of the next chunk.
        """
        new = self.score(chunk)
        expected = tuple(chunk.key.shape[:3])
        if tuple(new.shape) != expected:
            raise ValueError(
                f"policy {type(self).__name__} returned scores of shape {tuple(new.shape)}; "
                f"expected [batch, KV heads, new tokens], {expected}"
            )
        if chunk.held is None:
            return new.float()
        return torch.cat([chunk.held.scores, new.float()], dim=2)

    def budgets(self, budget: int, num_layers: int) -> Sequence[int]:
        """How many units each layer that is not bounded by a window keeps, `budget` on average."""
        return [budget] * num_layers
