"""Locret (arXiv 2410.01805): trained retaining heads score every unit from its Q, K and V."""

from torch import Tensor

from locret.heads import RetainingHeads
from locret.policies.base import LayerChunk, Policy


class LocretPolicy(Policy):
    """Scores are the retaining heads'. Cost: one small MLP a layer and token.

    Args:
        heads: the heads, on the backbone's device.
    """

    name = "locret"

    def __init__(self, heads: RetainingHeads) -> None:
        self.heads = heads

    def score(self, chunk: LayerChunk) -> Tensor:
        return self.heads[chunk.layer_idx](chunk.qkv)
