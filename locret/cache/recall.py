"""Recall of evicted units, after InfLLM (arXiv 2402.04617, section 3): its settings and formulas,
and the blocks in host memory.

Whatever a policy evicts waits in host memory, in blocks (`locret.cache.host_blocks`). Before a
chunk or a decoding step attends, the blocks that its queries look for come back, are attended to
and are given up again: they are never scored, and never held.

A pool of blocks is never changed: adding blocks gives another pool that shares what was there. So a
snapshot of it is a reference, rows of a batch may share blocks, and rows that part and join again
have what they shared once.

Representatives (equation 4): the units of a block with the highest mean of q . k, over the queries
that came after them in the chunk that they were evicted after. Relevance of a block to a chunk
(equation 5): the sum of q . k over the chunk's queries and the block's representatives, so their
mean key is all that stays on the device.

B batch, H KV heads, G query heads a KV head, T new tokens, S units held, D head size, N blocks, n
units a block.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

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
    """The recall that was asked for, which may be given as names and values. ValueError: something
    else, an unknown name, or a value out of range."""
    if given is None or isinstance(given, Recall):
        return given
    known = [entry.name for entry in fields(Recall)]
    if not isinstance(given, Mapping) or set(given) - set(known):
        raise ValueError(f"recall is {given!r}; expected None, a Recall, or some of {known}")
    return Recall(**given)


def mean_logits(query: Tensor, context: Tensor | None, key: Tensor) -> Tensor:
    """Representative scores: the mean of q . k over the chunk's queries that come after a unit.

    Args:
        query: [B, H*G, T, D]; context: keys [B, H, S, D], None = none; key: [B, H, T, D]; rotated.

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
    if context is None:
        return scores
    asked = grouped.mean(dim=2)[..., None].to(context.dtype)
    return torch.cat([(context @ asked)[..., 0].float(), scores], dim=2)


def block_relevance(query: Tensor, means: Tensor) -> Tensor:
    """How much a chunk looks at blocks, [B, H, N] float32: the mean of q . k over its queries, the
    heads of a group, and the representatives of each block.

    Args:
        query: [B, H*G, T, D], rotated; means: mean keys of representatives, [B, H, N, D].
    """
    asked = query.unflatten(1, (means.shape[1], -1)).float().mean(dim=(2, 3))
    return (means.float() @ asked[..., None])[..., 0]


@dataclass(frozen=True)
class Segment:
    """Blocks that came together.

    Attributes:
        start: place of the first.
        tensors: tensors [N, n, D] or [N, n] in host memory, pinned if they come from a GPU.
        written: when the copy from the GPU is over; None = it is.
    """

    start: int
    tensors: tuple[Tensor, ...]
    written: torch.cuda.Event | None

    @property
    def end(self) -> int:
        return self.start + self.tensors[0].shape[0]


@dataclass(frozen=True)
class HostPool:
    """Blocks in host memory, each on a place of its own that never changes."""

    segments: tuple[Segment, ...] = ()

    @property
    def count(self) -> int:
        """N."""
        return self.segments[-1].end if self.segments else 0

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(tensor.nbytes for segment in self.segments for tensor in segment.tensors)

    def with_blocks(self, tensors: Sequence[Tensor]) -> "HostPool":
        """This pool and more blocks, [N, n, D] or [N, n], on places from `count` on. Those of a GPU
        are copied while it goes on."""
        if not tensors[0].is_cuda:
            return HostPool((*self.segments, Segment(self.count, tuple(tensors), None)))
        copies = tuple(
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors
        )
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        written = torch.cuda.Event()
        written.record(torch.cuda.current_stream(tensors[0].device))
        return HostPool((*self.segments, Segment(self.count, copies, written)))

    def joined(self, other: "HostPool") -> tuple["HostPool", Tensor]:
        """This pool and another one's blocks, on places from `count` on but for those that it has.

        Returns:
            The pool, and the place there of each of the other's blocks, long [N of the other].
        """
        starts = {id(segment.tensors[0]): segment.start for segment in self.segments}
        joined, moved = self, []
        for segment in other.segments:
            start = starts.get(id(segment.tensors[0]))
            if start is None:
                start = joined.count
                joined = HostPool((*joined.segments, replace(segment, start=start)))
            moved.append(torch.arange(start, start + segment.end - segment.start))
        return joined, torch.cat([torch.empty(0, dtype=torch.long), *moved])

    def fetch(self, places: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """The blocks on these places, at least one, as one tensor for each kind on `device`."""
        starts = [segment.start for segment in self.segments]
        found = [self.segments[bisect.bisect_right(starts, place) - 1] for place in places]
        for segment in {id(each): each for each in found}.values():
            if segment.written is not None:
                segment.written.synchronize()
        fetched = []
        for which, like in enumerate(found[0].tensors):
            # Side by side first: one transfer instead of one for every block.
            staged = torch.empty(
                len(places), *like.shape[1:], dtype=like.dtype, pin_memory=device.type == "cuda"
            )
            for target, place, segment in zip(staged, places, found, strict=True):
                target.copy_(segment.tensors[which][place - segment.start])
            fetched.append(staged.to(device, non_blocking=True))
        return tuple(fetched)

    def pinned(self) -> "HostPool":
        """The same in pinned memory, from where a GPU fetches faster."""
        return HostPool(
            tuple(
                Segment(each.start, tuple(x.pin_memory() for x in each.tensors), each.written)
                for each in self.segments
            )
        )
