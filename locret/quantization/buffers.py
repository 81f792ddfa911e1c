"""Buffers of one layer that grow, are selected from and go back to what they were, all together.

What is stored is never changed where it stands: appending writes behind it, evicting makes a new
storage. That is why a snapshot of a cache costs nothing (`BuffersView`).

B batch, H KV heads, S units, D head size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from locret.kernels import gather_units


class BuffersView(NamedTuple):
    """What the buffers held at some moment: the storage and how many units of it were in use."""

    storage: tuple[Tensor, ...]
    units: int


class Buffers:
    """Tensors [B, H, S] or [B, H, S, D], parallel to each other.

    Storage may be larger than the units in it (`room`), so that units are appended in place.

    Attributes:
        tensors: the storage, spare room included.
        count: S.
    """

    tensors: tuple[Tensor, ...]
    count: int

    def __init__(self, storage: Sequence[Tensor] = ()) -> None:
        self._replace(tuple(storage))

    def __getitem__(self, which: int) -> Tensor:
        return self.tensors[which][:, :, : self.count]

    def __iter__(self) -> Iterator[Tensor]:
        return (tensor[:, :, : self.count] for tensor in self.tensors)

    @property
    def capacity(self) -> int:
        """Units that there is room for."""
        if not self.tensors or not self._room_is_ours:
            return self.count
        if self.tensors[0].is_inference() and not torch.is_inference_mode_enabled():
            return self.count  # what was made in inference mode cannot be written outside it
        return self.tensors[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, spare room included."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def append(self, new: Sequence[Tensor], room: int = 0) -> None:
        """Add units after the others.

        Args:
            new: one for each of the tensors.
            room: when the storage must grow, how many units more than needed it takes.
        """
        end = self.count + new[0].shape[2]
        if end > self.capacity or not self.tensors:
            grown = tuple(x.new_empty(*x.shape[:2], end + room, *x.shape[3:]) for x in new)
            for whole, old in zip(grown, self, strict=False):
                whole[:, :, : self.count] = old
            self.tensors, self._room_is_ours = grown, True
        for stored, fresh in zip(self.tensors, new, strict=True):
            stored[:, :, self.count : end] = fresh
        self.count = end

    def append_selected(self, new: Sequence[Tensor], index: Tensor) -> None:
        """Hold the units at `index` [B, H, K] (long, ascending) of old and new ones together; drop
        spare room. Old and new units are never put side by side."""
        if self.tensors:
            self._replace(gather_units(list(self), new, index))
        else:
            self._replace(tuple(new))
            self.select(index)

    def select(self, index: Tensor) -> None:
        """Hold only the units at `index` [B, H, K] (long, ascending); drop spare room."""
        self._replace(gathered(tuple(self), index))

    def replace(self, which: int, tensor: Tensor) -> None:
        """Hold `tensor` in place of one of the tensors, for the same units."""
        if self.tensors[0].shape[2] > self.count:  # there may be room behind the units
            whole = self.tensors[which].clone()
            whole[:, :, : self.count] = tensor
            tensor = whole
        self.tensors = (*self.tensors[:which], tensor, *self.tensors[which + 1 :])

    def with_room(self, room: int) -> "Buffers":
        """A copy with room for so many units more."""
        copied = Buffers()
        copied.append(list(self), room)
        return copied

    def view(self) -> BuffersView:
        """What is held now, for `restore`."""
        return BuffersView(self.tensors, self.count)

    def restore(self, view: BuffersView) -> None:
        """Hold again what was held when `view` was taken.

        What came after it may be in the spare room, and in another view: the room is not used.
        """
        self.tensors, self.count = view
        self._room_is_ours = False

    def select_batch(self, rows: Tensor) -> None:
        """Hold only the batch rows `rows` [B'] (long); rows may repeat."""
        self.tensors = tuple(tensor.index_select(0, rows) for tensor in self.tensors)
        self._room_is_ours = True

    def move(self, device: torch.device) -> None:
        """Be on `device`."""
        self.tensors = tuple(tensor.to(device) for tensor in self.tensors)
        self._room_is_ours = True

    def clear(self) -> None:
        self._replace(())

    @staticmethod
    def stack(rows: "Sequence[Buffers]") -> "Buffers":
        """Buffers of one batch row each as one batch, aligned at their last unit; zeros before."""
        longest = max(row.count for row in rows)
        if longest and all(row.count == longest for row in rows):
            return Buffers([torch.cat(tensors) for tensors in zip(*rows, strict=True)])
        some = next((row for row in rows if row.tensors), None)
        stacked = []
        for which, like in enumerate(some.tensors if some else ()):
            whole = like.new_zeros(len(rows), like.shape[1], longest, *like.shape[3:])
            for target, row in zip(whole, rows, strict=True):
                if row.count:
                    target[:, longest - row.count :] = row[which][0]
            stacked.append(whole)
        return Buffers(stacked)

    def _replace(self, storage: tuple[Tensor, ...]) -> None:
        self.tensors, self._room_is_ours = storage, True
        self.count = storage[0].shape[2] if storage else 0


def gathered(tensors: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
    """The units at `index` [B, H, K] of tensors [B, H, S] or [B, H, S, D]."""
    return tuple(
        x.gather(2, index if x.dim() == 3 else index[..., None].expand(*index.shape, x.shape[3]))
        for x in tensors
    )
