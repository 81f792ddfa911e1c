"""Keep every unit: the reference that every other policy is compared with."""

from torch import Tensor

from locret.policies.base import LayerChunk, Policy
from locret.units import unscored


class FullPolicy(Policy):
    """Nothing is ever evicted."""

    name = "full"
    evicts = False

    def score(self, chunk: LayerChunk) -> Tensor:
        return unscored(chunk.key)
