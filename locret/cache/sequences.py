"""How many units each sequence of a layer holds, and where in flat tensors they lie.

A *sequence* is the units of one row and KV head, in the order of their slots. A flat tensor [N, *]
has the sequences one after the other, rows outermost; N is the sum of their lengths. So no slot is
ever empty. Python knows all lengths: nothing waits for the device to learn one.

B rows, H KV heads, Q = B * H sequences.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Counts = tuple[tuple[int, ...], ...]
"""Units by row and head."""


@dataclass(frozen=True)
class Sequences:
    """The lengths of sequences. Made by `sequences_of`, so that equal ones share their tensors.

    Attributes:
        counts: units of each row and head, [B][H].
        device: where the tensors are.
    """

    counts: Counts
    device: torch.device

    @cached_property
    def flat(self) -> tuple[int, ...]:
        """The lengths of the Q sequences."""
        return tuple(itertools.chain.from_iterable(self.counts))

    @property
    def shape(self) -> tuple[int, int]:
        """(B, H)."""
        return len(self.counts), len(self.counts[0])

    @cached_property
    def total(self) -> int:
        """N."""
        return sum(self.flat)

    @cached_property
    def longest(self) -> int:
        return max(self.flat)

    @cached_property
    def longest_of_rows(self) -> tuple[int, ...]:
        """Of each row, over its heads."""
        return tuple(map(max, self.counts))

    @cached_property
    def equal(self) -> bool:
        """All have one length, so that flat tensors are rectangles too."""
        return min(self.flat) == self.longest

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where each sequence begins in flat tensors, and N: Q + 1 numbers."""
        return (0, *itertools.accumulate(self.flat))

    @cached_property
    def lengths(self) -> Tensor:
        """[B, H] long."""
        return sent(self.counts, self.device)

    @cached_property
    def offsets(self) -> Tensor:
        """`bounds` on the device, [Q + 1] int32."""
        return sent(self.bounds, self.device, torch.int32)

    @cached_property
    def owner(self) -> Tensor:
        """The sequence of each unit, [N] long."""
        which = torch.arange(len(self.flat), device=self.device)
        return which.repeat_interleave(self.lengths.flatten(), output_size=self.total)

    @cached_property
    def local(self) -> Tensor:
        """The number of each unit within its sequence, [N] long."""
        every = torch.arange(self.total, device=self.device)
        return every - self.offsets.long()[self.owner]

    @cached_property
    def empty(self) -> Tensor | None:
        """How many slots of a rectangle that is filled up in front stay empty, [B, H] long; None =
        none in any."""
        return None if self.equal else self.longest - self.lengths

    @cached_property
    def slots(self) -> Tensor:
        """The slot of each unit at compact positions, [N] long: its number within its sequence,
        such that the last units of a row's heads share a slot."""
        longest = sent(self.longest_of_rows, self.device)
        front = (longest[:, None] - self.lengths).flatten()
        return self.local + front[self.owner]

    def plus(self, more: int) -> "Sequences":
        """Each `more` units longer."""
        return sequences_of(tuple(tuple(n + more for n in row) for row in self.counts), self.device)

    def take(self, rows: Sequence[int]) -> "Sequences":
        """Some rows, which may repeat."""
        return sequences_of(tuple(self.counts[row] for row in rows), self.device)

    def index_of(self, rows: Sequence[int]) -> Tensor:
        """Where the units of some rows are in flat tensors, [N'] long."""
        heads, bounds = self.shape[1], self.bounds
        ranges = [(bounds[row * heads], bounds[(row + 1) * heads]) for row in rows]
        return torch.cat([torch.arange(*span, device=self.device) for span in ranges])

    def rectangle(self, x: Tensor) -> Tensor:
        """A flat tensor [N, *] as [B, H, longest, *], filled up in front with zeros where lengths
        differ; a view where they do not."""
        if self.equal:
            return x.view(*self.shape, self.longest, *x.shape[1:])
        whole = x.new_zeros(len(self.flat) * self.longest, *x.shape[1:])
        whole.index_copy_(0, self._in_rectangle, x)
        return whole.view(*self.shape, self.longest, *x.shape[1:])

    def flattened(self, x: Tensor) -> Tensor:
        """What `rectangle` made [B, H, longest, *], flat again."""
        flat = x.flatten(0, 2)
        return flat if self.equal else flat.index_select(0, self._in_rectangle)

    @cached_property
    def _in_rectangle(self) -> Tensor:
        front = (self.longest - self.lengths).flatten()
        return self.owner * self.longest + front[self.owner] + self.local

    def split(self, x: Tensor) -> list[list[Tensor]]:
        """A flat tensor's sequences, [B][H]."""
        each = iter(x.split(self.flat))
        return [[next(each) for _ in row] for row in self.counts]


_IN_USE: WeakValueDictionary[tuple[Counts, torch.device], Sequences] = WeakValueDictionary()
"""By what makes them. Weak: their tensors are as large as what they index, and go with it."""


def sequences_of(counts: Counts, device: torch.device) -> Sequences:
    """The sequences of these lengths; the same object for the same ones, while it is in use."""
    found = _IN_USE.get((counts, device))
    if found is None:
        found = _IN_USE[counts, device] = Sequences(counts, device)
    return found


def alike(rows: int, heads: Sequence[int], device: torch.device) -> Sequences:
    """Rows whose heads hold so many units each."""
    return sequences_of((tuple(heads),) * rows, device)


def sent(
    numbers: Sequence[int] | Counts, device: torch.device, dtype: torch.dtype = torch.long
) -> Tensor:
    """Python's numbers as a tensor on a device. `torch.tensor(numbers, device=device)` waits for
    all that is queued there; this does not."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
