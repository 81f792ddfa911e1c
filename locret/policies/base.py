"""What a policy is: a rule that scores new cache units. One method makes a policy.

B batch, H KV heads, G query heads a KV head, T new tokens, D head size, W = (H*G + 2H) * D.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerChunk:
    """What a policy sees of one chunk in one layer.

    Attributes:
        layer_idx: the layer.
        query: [B, H*G, T, D], before RoPE.
        key, value: [B, H, T, D], the new units', before RoPE.
        start: source position of the first new token; the others follow.
        scaling: the layer's softmax scale.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    start: int
    scaling: float

    @property
    def qkv(self) -> Tensor:
        """[Q, K, V] of all heads side by side, in this order: [B, T, W]; the heads' input."""
        return flatten_qkv(self.query, self.key, self.value)


class Policy:
    """Scores new units once, when their chunk is read. Subclasses implement `score`.

    A policy keeps no state of a request: the same chunk always gets the same scores.
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    """False: the policy keeps every unit, and a budget has no effect."""

    def score(self, chunk: LayerChunk) -> Tensor:
        """Finite scores [B, H, T] of the chunk's units; higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must implement score()")


def flatten_qkv(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, heads, T, D] each -> [B, T, W] together."""
    return torch.cat([x.transpose(1, 2).flatten(2) for x in (query, key, value)], dim=-1)
