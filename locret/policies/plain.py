"""Policies that look at no query: all units, random ones, the first and the last, two by keys, and
tokens that surprised the model."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from locret.cache.store import unscored
from locret.policies.base import HIGHEST, LayerChunk, Policy
from locret.quantities import check_between, check_whole


class FullPolicy(Policy):
    """Every unit stays: the reference that every other policy is compared with."""

    name = "full"
    evicts = False

    def score(self, chunk: LayerChunk) -> Tensor:
        return unscored(chunk.key)


class RandomPolicy(Policy):
    """The floor that every policy must beat: uniform scores, reproducible by seed, layer and chunk;
    rows have the same, so that each is answered as it would be alone, but for padded rows that
    evict their answers. Cost: none.

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


class StreamingLLMPolicy(Policy):
    """StreamingLLM (arXiv 2309.17453): keeps `sinks` first tokens (attention sinks) and as many
    recent ones as the budget holds. Cost: none.

    Args:
        sinks: how many of the first tokens are always kept.
    """

    name = "streaming_llm"

    def __init__(self, sinks: int = 4) -> None:
        check_whole("sinks", sinks, 0)
        self.sinks = sinks

    def score(self, chunk: LayerChunk) -> Tensor:
        # float32 counts exactly up to 16.7 million tokens
        scores = chunk.own_positions.float()[:, None].expand(chunk.key.shape[:3])
        return scores.masked_fill(chunk.among_first(self.sinks), HIGHEST)


class KNormPolicy(Policy):
    """K-norm (arXiv 2406.11430), keys of small norm are attended most: score(k) = -||k||, each KV
    head by itself, given once. Cost: none to speak of."""

    name = "knorm"

    def score(self, chunk: LayerChunk) -> Tensor:
        # float32: in half precision most norms of neighbours would be equal
        return -chunk.rotated_key.float().norm(dim=-1)


class KeyDiffPolicy(Policy):
    """KeyDiff (arXiv 2504.15364), keys that differ from the average key: score(k) = -cosine(k, mean
    of the normalized keys held), over rotated keys (section 3).

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


class SirLLMPolicy(Policy):
    """score(token) = -log p(token | what was held), the "token entropy" of section 3.2; the same in
    every layer and head. The first `sinks` tokens are always kept, and the last `recent` ones.

    Cost: the language-model head on every token, in blocks; and layers can only evict after the
    chunk has gone through all of them, so that the peak is layers x (budget + chunk).

    Args:
        sinks: first tokens kept; published 4.
        recent: last tokens kept, but no more than a third of the budget; published 512 of 1516.
        decay: old scores are multiplied by it with every chunk of several tokens; published 1 to
            0.7, by task.
    """

    name = "sirllm"
    waits = True

    def __init__(self, sinks: int = 4, recent: int = 512, decay: float = 1.0) -> None:
        check_whole("sinks", sinks, 0)
        check_whole("recent", recent, 0)
        check_between("decay", decay, 0, 1)
        if not decay:
            raise ValueError(f"decay is {decay}; expected above 0 and at most 1")
        self.sinks = sinks
        self.recent_units = recent
        self.decay = decay

    def score(self, chunk: LayerChunk) -> Tensor:
        return unscored(chunk.key).masked_fill(chunk.among_first(self.sinks), HIGHEST)

    def reconsider(self, scores: list[Tensor], surprisal: Callable[[], Tensor]) -> list[Tensor]:
        given = surprisal().clamp(max=HIGHEST)[:, None]
        new, reconsidered = given.shape[2], []
        for layer in scores:
            old = layer[..., :-new]
            # Sinks do not fade, nor does anything by the steps of an answer: a round is meant.
            if new > 1 and self.decay < 1:
                old = torch.where(old < HIGHEST, old * self.decay, old)
            own = torch.maximum(layer[..., -new:], given.to(layer.device))
            reconsidered.append(torch.cat([old, own], dim=2))
        return reconsidered

    def recent(self, budget: int) -> int:
        return min(self.recent_units, budget // 3)
