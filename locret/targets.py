"""Causal importance labels: how much the answer looks at every prompt unit. Pure functions.

B batch, H KV heads, G query heads a KV head, A answer tokens, P prompt tokens, D head size.
Each function is a label definition: `(query, key, scaling) -> labels`, higher = keep.
"""

import torch
from torch import Tensor

_BLOCK = 256  # answer tokens at a time: the logits of a block are B x H x G x 256 x P


def max_logit(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The paper's label (section 3.2): the largest pre-softmax logit a unit gets from the answer.

    max over answer tokens a and query heads g of the group of  scaling * <query[g, a], key[k]>.

    Args:
        query: [B, H*G, A, D], the answer's, after RoPE.
        key: [B, H, P, D], the prompt's, after RoPE.
        scaling: the layer's softmax scale, usually 1 / sqrt(D).

    Returns:
        Float32 [B, H, P].
    """
    batch, heads, prompt, size = key.shape
    # A group shares its keys, so its query heads are only more rows to take the maximum over.
    rows = query.reshape(batch, heads, -1, size)
    labels = torch.full((batch, heads, prompt), -torch.inf, device=key.device)
    for block in rows.split(_BLOCK, dim=2):
        logits = torch.matmul(block, key.transpose(2, 3)).amax(dim=2)
        labels = torch.maximum(labels, logits.float() * scaling)
    return labels


LABELS = {"max_logit": max_logit}
"""Label definitions by the name that configs and artifacts use."""
