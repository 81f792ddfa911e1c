"""Locret (arXiv 2410.01805): trained retaining heads score every unit as it is made."""

from torch import Tensor

from locret.heads.heads import FEATURES, RetainingHeads
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
        features = FEATURES[self.heads.config.tap]
        return self.heads[chunk.layer_idx](features(chunk))
