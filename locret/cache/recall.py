"""Recall of evicted units, after InfLLM (arXiv 2402.04617, section 3): its settings and formulas.

Whatever a policy evicts waits in host memory, in blocks (`locret.cache.host_blocks`). Before a
chunk or a decoding step attends, the blocks that its queries look for come back, are attended to
and are given up again: they are never scored, and never held.

Representatives (equation 4): the units of a block with the highest mean of q . k, over the queries
that came after them in the chunk that they were evicted after. Relevance of a block to a chunk
(equation 5): the sum of q . k over the chunk's queries and the block's representatives, so their
mean key is all that stays on the device.

B batch, H KV heads, G query heads a KV head, T new tokens, S units held, D head size, N blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from locret.quantities import is_whole


@dataclass(frozen=True)
class Recall:
    """What comes back of evicted units.

    Attributes:
        block_size: units a block.
        blocks: how many come back, in every KV head: `blocks` x `block_size` units beside the
            budget, and less than one block that waits to be filled.
        representatives: units of a block that stand for it.

    Raises:
        ValueError: a number that is none or below 1, or more representatives than units.
    """

    block_size: int = 128
    blocks: int = 16
    representatives: int = 4

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not is_whole(value, 1):
                raise ValueError(
                    f"recall: {entry.name} is {value!r}; expected a whole number of at least 1"
                )
        if self.representatives > self.block_size:
            raise ValueError(
                f"recall: representatives is {self.representatives} but a block has "
                f"{self.block_size} units; lower it, or raise block_size"
            )


def recall_of(given: Recall | Mapping[str, int] | None) -> Recall | None:
    """The recall that was asked for, which may be given as names and values.

    Raises:
        ValueError: something else, an unknown name, or a value out of range.
    """
    if given is None or isinstance(given, Recall):
        return given
    known = [entry.name for entry in fields(Recall)]
    if not isinstance(given, Mapping) or set(given) - set(known):
        raise ValueError(f"recall is {given!r}; expected None, a Recall, or some of {known}")
    return Recall(**given)


def mean_logits(query: Tensor, held: Tensor | None, key: Tensor) -> Tensor:
    """Representative scores: the mean of q . k over the chunk's queries that come after a unit.

    Args:
        query: [B, H*G, T, D]; held: keys [B, H, S, D], None = none; key: [B, H, T, D]; rotated.

    Returns:
        [B, H, S + T] float32, the mean of a group's heads. -inf for the last new unit: no query
        came after it.
    """
    tokens = key.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)).float().mean(dim=2)
    after = grouped.flip(2).cumsum(dim=2).flip(2) - grouped
    counts = torch.arange(tokens - 1, -1, -1, device=key.device)
    scores = (after * key.float()).sum(dim=-1) / counts.clamp(min=1)
    scores = scores.masked_fill(counts == 0, -torch.inf)
    if held is None:
        return scores
    asked = grouped.mean(dim=2)[..., None].to(held.dtype)
    return torch.cat([(held @ asked)[..., 0].float(), scores], dim=2)


def block_relevance(query: Tensor, means: Tensor) -> Tensor:
    """How much a chunk looks at blocks, [B, H, N] float32: the mean of q . k over its queries, the
    heads of a group, and the representatives of each block.

    Args:
        query: [B, H*G, T, D], rotated; means: mean keys of representatives, [B, H, N, D].
    """
    asked = query.unflatten(1, (means.shape[1], -1)).float().mean(dim=(2, 3))
    return (means.float() @ asked[..., None])[..., 0]
