"""H2O (arXiv 2306.14048): heavy hitters, units that received most attention, and recent ones."""

from torch import Tensor
from torch.nn.functional import pad

from locret.policies.base import LayerChunk, Policy, attention_received
from locret.quantities import check_between, check_whole


class H2OPolicy(Policy):
    """score(k) = attention mass that k received from all queries since it came (section 4); the
    last `recent_share` of the budget is kept whatever it scored.

    Cost: the attention logits of a chunk once more, `block` queries at a time. Query heads of a
    group: mean of their masses (the published code has no groups).

    Args:
        recent_share: of the budget; the published half.
        block: queries whose weights over all units are in memory at a time.
    """

    name = "h2o"

    def __init__(self, recent_share: float = 0.5, block: int = 128) -> None:
        check_between("recent_share", recent_share, 0, 1)
        check_whole("block", block, 1)
        self.recent_share = recent_share
        self.block = block

    def rank(self, chunk: LayerChunk) -> Tensor:
        mass = attention_received(chunk, self.block)
        if chunk.context is None:
            return mass
        return mass + pad(chunk.context.scores, (0, chunk.key.shape[2]))

    def recent(self, budget: int) -> int:
        return int(self.recent_share * budget)
