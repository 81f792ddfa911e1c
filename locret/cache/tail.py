"""The tail of a layer: the tokens that came after the last eviction, equally many in all sequences;
and the units that a chunk brings.

What is stored is never changed where it stands: appending writes behind it, all else makes new
tensors. That is why a view, and so a snapshot of a cache, costs nothing.

B batch, H KV heads, T units of a sequence, D head size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TailView = tuple[tuple[Tensor, ...], int]
"""What a tail held at some moment: its storage and how many units of it were in use."""


class Tail:
    """Tensors [B, H, T] or [B, H, T, D], parallel to each other.

    Storage may be larger than the units in it (`room`), so that units are appended in place.

    Attributes:
        tensors: the storage, spare room included.
        count: T.
    """

    tensors: tuple[Tensor, ...]
    count: int

    def __init__(self, storage: Sequence[Tensor] = ()) -> None:
        self.tensors, self._room_is_ours = tuple(storage), True
        self.count = storage[0].shape[2] if storage else 0

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

    def replace(self, which: int, tensor: Tensor) -> None:
        """Hold `tensor` in place of one of the tensors, for the same units."""
        if self.tensors[0].shape[2] > self.count:  # there may be room behind the units
            whole = self.tensors[which].clone()
            whole[:, :, : self.count] = tensor
            tensor = whole
        self.tensors = (*self.tensors[:which], tensor, *self.tensors[which + 1 :])

    def drop(self, which: int) -> None:
        """Hold one of the tensors no more."""
        self.tensors = (*self.tensors[:which], *self.tensors[which + 1 :])

    def with_room(self, room: int) -> "Tail":
        """A copy with room for so many units more."""
        copied = Tail()
        copied.append(list(self), room)
        return copied

    def view(self) -> TailView:
        """What is held now, for `restore`."""
        return self.tensors, self.count

    def restore(self, view: TailView) -> None:
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
        self.tensors, self._room_is_ours, self.count = (), True, 0


class NewTokens(NamedTuple):
    """Units to be added, as they are stored: keys and values [B, H, T, D], scores [B, H, T] float32
    (higher = keep), source positions [B, H, T] int32, above all that are there."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None
    ) -> "NewTokens":
        """Units with positions [T], or [1 or B, 1 or H, T], and scores [B, H, T]; None = those of
        units that are not to be evicted."""
        scores = unscored(keys) if scores is None else scores.float()
        return cls(keys, values, scores, positions.int().expand(keys.shape[:3]))

    def first(self, count: int) -> "NewTokens":
        """The first `count` of them."""
        return NewTokens(*(x[:, :, :count] for x in self))


def unscored(keys: Tensor) -> Tensor:
    """Scores [B, H, T] for units that no policy has scored and that are not to be evicted."""
    return torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
