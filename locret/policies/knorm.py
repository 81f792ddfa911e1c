"""K-norm (arXiv 2406.11430): keys of small norm are attended most."""

from torch import Tensor

from locret.policies.base import LayerChunk, Policy


class KNormPolicy(Policy):
    """score(k) = -||k||, each KV head by itself, given once. Cost: none to speak of."""

    name = "knorm"

    def score(self, chunk: LayerChunk) -> Tensor:
        # float32: in half precision most norms of neighbours would be equal
        return -chunk.rotated_key.float().norm(dim=-1)
