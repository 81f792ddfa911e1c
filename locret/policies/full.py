"""Keep every unit: the reference that every other policy is compared with."""

from torch import Tensor

from locret.cache.tail import unscored
from locret.policies.base import LayerChunk, Policy


class FullPolicy(Policy):
    """Nothing is ever evicted."""

    name = "full"
    evicts = False

    def score(self, chunk: LayerChunk) -> Tensor:
        return unscored(chunk.key)
