"""Policies by the attention that units receive: H2O, TOVA, and what they look at.

B batch, H KV heads, G query heads a KV head, S slots, T new tokens, W queries, D head size.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from locret.policies.base import HIGHEST, LayerChunk, Policy
from locret.quantities import check_between, check_whole


def attention_weights(
    query: Tensor, keys: Tensor, first: int, scaling: float, filled: Tensor | None
) -> Tensor:
    """Softmax over the slots that each query sees; zeros for a query whose own slot is empty.

    Args:
        query: [B, H*G, W, D], rotated, at the slots first .. first + W - 1.
        keys: [B, H, S, D], rotated.
        filled: bool [B, H, S], slots that hold a unit; None = all.

    Returns:
        [B, H, G, W, S] float32.
    """
    batch, heads, slots, size = keys.shape
    grouped = query.reshape(batch, heads, -1, query.shape[2], size)
    logits = torch.matmul(grouped, keys[:, :, None].transpose(-1, -2)).float() * scaling
    slot = torch.arange(slots, device=keys.device)
    own = torch.arange(first, first + query.shape[2], device=keys.device)
    hidden = slot > own[:, None]
    if filled is None:
        return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    # A query without a unit of its own is padding: it sees nothing, and softmax makes NaN of that.
    seen = filled[:, :, None] & ~hidden & filled[:, :, first : first + query.shape[2], None]
    return logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def attention_received(chunk: LayerChunk, block: int) -> Tensor:
    """Attention mass that held and new units receive from the chunk's queries, [B, H, S + T]
    float32: summed over queries, averaged over the query heads of a group.

    `block` queries are computed at a time, so that no T x S matrix is kept.
    """
    keys, filled, before = chunk.all_keys(), chunk.filled(), chunk.context_length
    mass = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    for start in range(0, chunk.rotated_query.shape[2], block):
        query = chunk.rotated_query[:, :, start : start + block]
        weights = attention_weights(query, keys, before + start, chunk.scaling, filled)
        mass += weights.sum(dim=3).mean(dim=2)
    return mass


class H2OPolicy(Policy):
    """H2O (arXiv 2306.14048), heavy hitters: score(k) = attention mass that k received from all
    queries since it came (section 4); the last `recent_share` of the budget is kept whatever it
    scored.

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


class TOVAPolicy(Policy):
    """TOVA (arXiv 2401.06104): score(k) = attention of the last query on k, averaged over all query
    heads of the layer (section 3.2). All units are ranked anew after every chunk; the last one is
    kept.

    Cost: the attention logits of one query.
    """

    name = "tova"

    def rank(self, chunk: LayerChunk) -> Tensor:
        keys = chunk.all_keys()
        before = keys.shape[2] - 1
        query = chunk.rotated_query[:, :, -1:]
        weights = attention_weights(query, keys, before, chunk.scaling, chunk.filled())
        scores = weights[..., 0, :before].mean(dim=(1, 2))
        return pad(scores, (0, 1), value=HIGHEST)[:, None].expand(keys.shape[:3])
