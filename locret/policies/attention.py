"""Attention weights that policies look at: of some queries, over held and new units.

B batch, H KV heads, G query heads a KV head, W queries, S slots, D head size.
"""

import torch
from torch import Tensor

from locret.policies.base import LayerChunk


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
    keys, filled, held = chunk.all_keys(), chunk.filled(), chunk.num_held
    mass = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    for start in range(0, chunk.rotated_query.shape[2], block):
        query = chunk.rotated_query[:, :, start : start + block]
        weights = attention_weights(query, keys, held + start, chunk.scaling, filled)
        mass += weights.sum(dim=3).mean(dim=2)
    return mass
