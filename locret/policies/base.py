"""What a policy is: a rule that scores new cache units. One method makes a policy.

B batch, H KV heads, G query heads a KV head, T new tokens, D head size.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class LayerChunk:
    """What a policy sees of one chunk in one layer.

    Attributes:
        layer_idx: the layer.
        query: [B, H*G, T, D], before RoPE.
        key, value: [B, H, T, D], the new units', before RoPE.
        hidden: [B, T, hidden size], the attention layer's input.
        start: source position of the first new token; the others follow.
        scaling: the layer's softmax scale.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    start: int
    scaling: float


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
