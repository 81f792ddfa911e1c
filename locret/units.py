"""Growable storage of the cache units of one layer.

A cache unit is one token's key, value, score and source position in one KV head. The four tensors
live and move together: there is one append and one index, so they cannot drift apart.

What is stored is never changed where it stands: appending writes behind it, evicting makes a new
storage. That is why a snapshot of a cache costs nothing (`UnitsView`).

Shapes: B batch, H KV heads, S units held, T new units, D head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from locret.kernels import gather_units


class NewUnits(NamedTuple):
    """Units to be added: keys and values [B, H, T, D], scores [B, H, T], positions [T] or
    [B, H, T], above all that are held."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor

    def prepared(self) -> tuple[Tensor, ...]:
        """The four tensors as they are stored."""
        positions = self.positions.expand(self.keys.shape[:3])
        return self.keys, self.values, self.scores.float(), positions

    def first(self, count: int) -> "NewUnits":
        """The first `count` of them."""
        keys, values, scores = (x[:, :, :count] for x in self[:3])
        return NewUnits(keys, values, scores, self.positions[..., :count])


class UnitsView(NamedTuple):
    """What a layer held at some moment: its storage and how many units of it were in use."""

    storage: tuple[Tensor, ...]
    held: int


class Units:
    """Keys and values [B, H, S, D], scores [B, H, S] float32, source positions [B, H, S] long.

    Storage may be larger than what is held (`room`), so that decoding appends in place.
    """

    def __init__(self) -> None:
        self._storage: tuple[Tensor, ...] = ()
        self.held = 0

    @property
    def keys(self) -> Tensor:
        return self._view(0)

    @property
    def values(self) -> Tensor:
        return self._view(1)

    @property
    def scores(self) -> Tensor:
        return self._view(2)

    @property
    def source_positions(self) -> Tensor:
        return self._view(3)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The storage itself, spare room included: what the memory is really spent on."""
        return self._storage

    @property
    def capacity(self) -> int:
        """Units that the storage has room for."""
        return self._storage[0].shape[2] if self._storage else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, spare room included."""
        return sum(tensor.nbytes for tensor in self._storage)

    def append(
        self, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, room: int = 0
    ) -> None:
        """Add T new units after those held.

        Args:
            keys, values, scores, positions: see `NewUnits`; scores: higher = keep.
            room: when the storage must grow, how many units more than needed it takes.
        """
        new = NewUnits(keys, values, scores, positions).prepared()
        end = self.held + keys.shape[2]
        if end > self.capacity:
            self._grow(new, end + room)
        for stored, fresh in zip(self._storage, new, strict=True):
            stored[:, :, self.held : end] = fresh
        self.held = end

    def append_selected(self, new: NewUnits, index: Tensor) -> None:
        """Hold those units at `index` [B, H, K] (long, ascending) that held and new ones are
        together; drop spare room. The units held and the new ones are never put side by side."""
        fresh = new.prepared()
        if not self._storage:
            self._storage, self.held = fresh, new.keys.shape[2]
            self.select(index)
            return
        held = [self._view(which) for which in range(4)]
        self._storage, self.held = gather_units(held, fresh, index), index.shape[2]

    def select(self, index: Tensor) -> None:
        """Hold only the units at `index` [B, H, K] (long, ascending); drop spare room."""
        self._storage = tuple(_at(self._view(which), index) for which in range(4))
        self.held = index.shape[2]

    def rebuild(self, keys: Tensor, room: int) -> None:
        """Hold the same units with other `keys` [B, H, S, D], in a storage with `room` to spare.

        The spare room's scores are zero and its source positions go on from the last one, so that
        units put there by key and value alone are whole.
        """
        old = [keys, *(self._view(which) for which in range(1, 4))]
        self._storage, held = (), self.held
        self._grow(tuple(old), held + room)
        for new, kept in zip(self.tensors, old, strict=True):
            new[:, :, :held] = kept

    def replace_scores(self, scores: Tensor) -> None:
        """Give the units held other `scores` [B, H, S]."""
        storage = list(self._storage)
        if self.capacity > self.held:  # behind what is held there may be room
            whole = storage[2].clone()
            whole[:, :, : self.held] = scores
            scores = whole
        storage[2] = scores
        self._storage = tuple(storage)

    def number_spare_room(self, first_position: int) -> None:
        """Prepare scores (zero) and source positions of units to be written in place."""
        scores, positions = self._storage[2], self._storage[3]
        scores[:, :, self.held :] = 0
        spare = self.capacity - self.held
        positions[:, :, self.held :] = torch.arange(
            first_position, first_position + spare, device=positions.device
        )

    def view(self) -> UnitsView:
        """What is held now, for `restore`."""
        return UnitsView(self._storage, self.held)

    def restore(self, view: UnitsView) -> None:
        """Hold again what was held when `view` was taken."""
        self._storage, self.held = view

    def move(self, device: torch.device) -> None:
        """Be on `device`."""
        self._storage = tuple(tensor.to(device) for tensor in self._storage)

    def select_batch(self, rows: Tensor) -> None:
        """Hold only the batch rows `rows` [B'] (long); rows may repeat."""
        self._storage = tuple(tensor.index_select(0, rows) for tensor in self._storage)

    def clear(self) -> None:
        self._storage = ()
        self.held = 0

    def _view(self, which: int) -> Tensor:
        return self._storage[which][:, :, : self.held]

    def _grow(self, like: tuple[Tensor, ...], capacity: int) -> None:
        grown = tuple(
            tensor.new_empty(*tensor.shape[:2], capacity, *tensor.shape[3:]) for tensor in like
        )
        if self._storage:
            for new, old in zip(grown, self._storage, strict=True):
                new[:, :, : self.held] = old[:, :, : self.held]
        self._storage = grown


def stack(rows: Sequence[Units]) -> tuple[Units, list[int]]:
    """The rows of a batch as one, aligned at their last unit.

    Args:
        rows: units with one batch row each; those without any are filled up as a whole.

    Returns:
        The units, and how many leading slots of each row hold nothing.
    """
    longest = max(row.held for row in rows)
    stacked = Units()
    empty = [longest - row.held for row in rows]
    some = next((row for row in rows if row.held), None)
    if some is None:
        return stacked, empty
    storage = []
    for which, like in enumerate(some.tensors):
        whole = like.new_zeros(len(rows), like.shape[1], longest, *like.shape[3:])
        for target, row in zip(whole, rows, strict=True):
            if row.held:
                target[:, longest - row.held :] = row._view(which)[0]
        storage.append(whole)
    stacked._storage, stacked.held = tuple(storage), longest
    return stacked, empty


def unscored(keys: Tensor) -> Tensor:
    """Scores [B, H, T] for units that no policy has scored and that are not to be evicted."""
    return torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)


def _at(tensor: Tensor, index: Tensor) -> Tensor:
    wide = index if tensor.dim() == 3 else index[..., None].expand(*index.shape, tensor.shape[-1])
    return tensor.gather(2, wide)
