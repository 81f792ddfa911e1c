"""StreamingLLM (arXiv 2309.17453): the first tokens (attention sinks) and the most recent ones."""

from torch import Tensor

from locret.policies.base import HIGHEST, LayerChunk, Policy
from locret.quantities import check_whole


class StreamingLLMPolicy(Policy):
    """Keeps `sinks` first tokens and as many recent ones as the budget holds. Cost: none.

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
