"""Growable storage of the cache units of one layer.

A cache unit is one token's key, value, score and source position in one KV head. The four tensors
live and move together: there is one append and one index, so they cannot drift apart.

Shapes: B batch, H KV heads, S units held, D head size.
"""

import torch
from torch import Tensor


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
    def nbytes(self) -> int:
        """Bytes of the storage, spare room included."""
        return sum(tensor.nbytes for tensor in self._storage)

    def append(
        self, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, room: int = 0
    ) -> None:
        """Add T new units after those held.

        Args:
            keys, values: [B, H, T, D].
            scores: [B, H, T]; higher = keep.
            positions: [T] or [B, H, T], source positions, above all that are held.
            room: when the storage must grow, how many units more than needed it takes.
        """
        positions = positions.expand(keys.shape[:3])
        new = (keys, values, scores.float(), positions)
        end = self.held + keys.shape[2]
        if not self._storage or end > self._storage[0].shape[2]:
            self._grow(new, end + room)
        for stored, fresh in zip(self._storage, new, strict=True):
            stored[:, :, self.held : end] = fresh
        self.held = end

    def select(self, index: Tensor) -> None:
        """Hold only the units at `index` [B, H, K] (long, ascending); drop spare room."""
        wide = index[..., None].expand(*index.shape, self._storage[0].shape[-1])
        self._storage = tuple(
            view.gather(2, wide if view.dim() == 4 else index) for view in map(self._view, range(4))
        )
        self.held = index.shape[2]

    def replace_keys(self, keys: Tensor) -> None:
        """Overwrite the keys held with `keys` [B, H, S, D]."""
        self._storage[0][:, :, : self.held] = keys

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


def unscored(keys: Tensor) -> Tensor:
    """Scores [B, H, T] for units that no policy has scored and that are not to be evicted."""
    return torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
