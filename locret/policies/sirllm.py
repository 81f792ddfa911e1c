"""SirLLM (arXiv 2405.12528): tokens that surprised the model, the first and the recent ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from locret.cache.tail import unscored
from locret.policies.base import HIGHEST, LayerChunk, Policy
from locret.quantities import check_between, check_whole


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
        new = given.shape[2]
        return [
            torch.cat(
                [
                    self._faded(layer[..., :-new], new),
                    torch.maximum(layer[..., -new:], given.to(layer.device)),
                ],
                dim=2,
            )
            for layer in scores
        ]

    def _faded(self, scores: Tensor, new: int) -> Tensor:
        """Old scores after `new` tokens came. Sinks do not fade, nor does anything by the steps of
        an answer: a round is meant, not a token."""
        if new == 1 or self.decay == 1:
            return scores
        return torch.where(scores < HIGHEST, scores * self.decay, scores)

    def recent(self, budget: int) -> int:
        return min(self.recent_units, budget // 3)
