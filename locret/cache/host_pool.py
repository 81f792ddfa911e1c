"""Blocks of evicted units in host memory: written once, looked up by row.

A pool is never changed: adding blocks gives another pool that shares what was there. So a snapshot
of it is a reference, rows of a batch may share blocks, and rows that part and join again have what
they shared once.

N blocks, n units a block, D head size.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Blocks that came together.

    Attributes:
        start: row of the first.
        columns: tensors [N, n, D] or [N, n] in host memory, pinned if they come from a GPU.
        written: when the copy from the GPU is over; None = it is.
    """

    start: int
    columns: tuple[Tensor, ...]
    written: torch.cuda.Event | None

    @property
    def end(self) -> int:
        return self.start + self.columns[0].shape[0]


@dataclass(frozen=True)
class HostPool:
    """Blocks in host memory, each with a row of its own that never changes."""

    segments: tuple[Segment, ...] = ()

    @property
    def count(self) -> int:
        """N."""
        return self.segments[-1].end if self.segments else 0

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(column.nbytes for segment in self.segments for column in segment.columns)

    def with_blocks(self, columns: Sequence[Tensor]) -> "HostPool":
        """This pool and more blocks, [N, n, D] or [N, n], on rows from `count` on. Those of a GPU
        are copied while it goes on."""
        if not columns[0].is_cuda:
            return HostPool((*self.segments, Segment(self.count, tuple(columns), None)))
        copies = tuple(
            torch.empty(column.shape, dtype=column.dtype, pin_memory=True) for column in columns
        )
        for copy, column in zip(copies, columns, strict=True):
            copy.copy_(column, non_blocking=True)
        written = torch.cuda.Event()
        written.record(torch.cuda.current_stream(columns[0].device))
        return HostPool((*self.segments, Segment(self.count, copies, written)))

    def joined(self, other: "HostPool") -> tuple["HostPool", Tensor]:
        """This pool and another one's blocks, on rows from `count` on but for those that it has.

        Returns:
            The pool, and the row there of each of the other's blocks, long [N of the other].
        """
        starts = {id(segment.columns[0]): segment.start for segment in self.segments}
        joined, moved = self, []
        for segment in other.segments:
            start = starts.get(id(segment.columns[0]))
            if start is None:
                start = joined.count
                joined = HostPool((*joined.segments, replace(segment, start=start)))
            moved.append(torch.arange(start, start + segment.end - segment.start))
        return joined, torch.cat([torch.empty(0, dtype=torch.long), *moved])

    def fetch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """The blocks on these rows, at least one, as one tensor a column on `device`."""
        starts = [segment.start for segment in self.segments]
        found = [self.segments[bisect.bisect_right(starts, row) - 1] for row in rows]
        for segment in {id(each): each for each in found}.values():
            if segment.written is not None:
                segment.written.synchronize()
        fetched = []
        for which, like in enumerate(found[0].columns):
            # Side by side first: one transfer instead of one for every block.
            staged = torch.empty(
                len(rows), *like.shape[1:], dtype=like.dtype, pin_memory=device.type == "cuda"
            )
            for place, row, segment in zip(staged, rows, found, strict=True):
                place.copy_(segment.columns[which][row - segment.start])
            fetched.append(staged.to(device, non_blocking=True))
        return tuple(fetched)

    def pinned(self) -> "HostPool":
        """The same in pinned memory, from where a GPU fetches faster."""
        return HostPool(
            tuple(
                Segment(each.start, tuple(c.pin_memory() for c in each.columns), each.written)
                for each in self.segments
            )
        )
