"""Random scores: the floor that every policy must beat."""

import torch
from torch import Tensor

from locret.policies.base import LayerChunk, Policy


class RandomPolicy(Policy):
    """Uniform scores, reproducible by seed, layer and chunk; rows have the same, so that each is
    answered as it would be alone, but for padded rows that evict their answers. Cost: none.

    Args:
        seed: of the scores; the global generator is left alone.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, chunk: LayerChunk) -> Tensor:
        # A tuple of integers hashes to the same value in every process.
        seed = hash((self.seed, chunk.layer_idx, chunk.start)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        rows, heads, tokens, _ = chunk.key.shape
        scores = torch.rand(1, heads, tokens, generator=generator)
        return scores.to(chunk.key.device).expand(rows, -1, -1)
