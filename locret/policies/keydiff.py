"""KeyDiff (arXiv 2504.15364): keys that differ from the average key."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from locret.policies.base import LayerChunk, Policy


class KeyDiffPolicy(Policy):
    """score(k) = -cosine(k, mean of the normalized keys held), over rotated keys (section 3).

    All units are ranked anew after every chunk, by the mean of what is held then, as the paper does
    block by block. Each KV head by itself. Cost: one pass over the keys held.
    """

    name = "keydiff"

    def rank(self, chunk: LayerChunk) -> Tensor:
        keys = chunk.all_keys().float()
        unit, filled = normalize(keys, dim=-1), chunk.filled()
        if filled is None:
            return -cosine_similarity(keys, unit.mean(dim=2, keepdim=True), dim=-1)
        total = torch.where(filled[..., None], unit, 0.0).sum(dim=2, keepdim=True)
        return -cosine_similarity(keys, total, dim=-1)  # a sum points where the mean does
