"""The units of one layer with keys and values in few bits (`docs/quantization.md`): what
`locret.cache.layer.PlainStore` does, over quantized units. Scores and source positions stay as they
are.

Keys and values are expanded when they are asked for, a layer at a time.

Shapes: B batch, H KV heads, S units held, T new units, D head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from locret.kernels import PackedKV
from locret.quantization import QuantizedStore, Scheme
from locret.quantization.buffers import Buffers, BuffersView
from locret.quantization.schemes import KiviScheme
from locret.quantization.store import QuantizedView, named_tensors, stack_stores, store_of

EXACT = ("scores", "source_positions")
STEPS = 256
"""Most units that an answer holds in full precision before they are packed, where its steps come
from a CUDA graph: packing makes new tensors, and so a new graph."""


class PackedView(NamedTuple):
    """What a layer held at some moment."""

    store: QuantizedView
    exact: BuffersView


class PackedStore:
    """Keys and values [B, H, S, D] in a quantized store, scores [B, H, S] float32, source positions
    [B, H, S] long.

    Args:
        scheme: how keys and values are packed.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.store = QuantizedStore(scheme)
        self._exact = Buffers()

    @property
    def count(self) -> int:
        """S."""
        return self._exact.count

    @property
    def keys(self) -> Tensor:
        """All keys, expanded."""
        return self.store.keys()

    @property
    def values(self) -> Tensor:
        """All values, expanded."""
        return self.store.values()

    @property
    def scores(self) -> Tensor:
        return self._exact[0]

    @property
    def source_positions(self) -> Tensor:
        return self._exact[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All storage, spare room included: what the memory is really spent on."""
        return *self.store.tensors, *self._exact.tensors

    @property
    def takes_steps(self) -> bool:
        """Whether `locret.engine.steps` can write new units in place and attend to all: by KIVI's
        formula, with rotated keys."""
        scheme = self.store.scheme
        return isinstance(scheme, KiviScheme) and scheme.outliers is None

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Storage [B, H, C, D] of the residual, where new units are written behind `filled`."""
        keys, values = self.store.residual.tensors
        return keys, values

    @property
    def filled(self) -> int:
        """Units in the residual."""
        return self.store.residual.count

    @property
    def packed(self) -> PackedKV | None:
        """The units before the residual, for the kernel."""
        keys, values, scheme = self.store.packed_keys, self.store.packed_values, self.store.scheme
        if keys is None or values is None:
            return None
        of_keys = (*keys.units, *keys.tables)
        return PackedKV(of_keys, keys.starts, values.units, scheme.bits, scheme.group)

    @property
    def spare(self) -> int:
        """Units that can be written in place."""
        both = (self.store.residual, self._exact)
        return min(each.capacity - each.count for each in both)

    @property
    def nbytes(self) -> int:
        """Bytes of all storage: codes, tables, outliers, residual, scores, positions, spare
        room."""
        return self.store.nbytes + self._exact.nbytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the storage of keys and values alone: codes, tables, outliers, residual."""
        return self.store.nbytes

    @property
    def full_bytes(self) -> int:
        """Bytes of one token's keys and values as they come."""
        return self.store.full_bytes if self.count else 0

    def append(self, new: Sequence[Tensor], room: int = 0) -> None:
        """Add T new units after those held, in full precision until they are packed.

        Args:
            new: as they are stored (`locret.cache.layer.NewTokens`).
            room: units that are expected to come.
        """
        (keys, values, *exact), scheme = new, self.store.scheme
        self.store.append(keys, values, min(room, scheme.residual + scheme.group))
        self._exact.append(exact, room)

    def append_selected(self, new: Sequence[Tensor], index: Tensor) -> None:
        """Hold those units at `index` [B, H, K] (long, ascending) that held and new ones are
        together: evict, then pack.

        Raises:
            ValueError: a key or value cannot be stored.
        """
        keys, values, *exact = new
        self.store.append(keys, values)
        self.store.select(index)
        self._exact.append_selected(exact, index)

    def select(self, index: Tensor) -> None:
        """Hold only the units at `index` [B, H, K] (long, ascending): evict, then pack."""
        self.store.select(index)
        self._exact.select(index)

    def pack(self, tight: bool = False) -> None:
        """What was appended has been attended to: pack it as far as it fills blocks; if `tight`,
        all but the scheme's residual, so that the bytes are those of an eviction."""
        if tight:
            every = torch.arange(self.count, device=self.scores.device)
            self.store.select(every.expand(*self.scores.shape[:2], -1))
        else:
            self.store.pack(room=self.store.scheme.group)

    def rebuild(self, keys: Tensor, room: int, empty: Tensor | None = None) -> None:
        """Hold the same units with other `keys` [B, H, S, D], in a storage with `room` to spare.
        The first `empty` [B, H] slots hold nothing."""
        if empty is not None:  # what stands there must not widen the range of its block
            slot = torch.arange(self.count, device=keys.device)
            filled = slot.maximum(empty[..., None]).clamp(max=self.count - 1)
            keys = keys.gather(2, filled[..., None].expand_as(keys))
        scheme = self.store.scheme
        self.store.rebuild(keys, min(room, scheme.residual + scheme.group))

    def make_room(self, room: int, first_position: int) -> None:
        """Let units be written to the residual in place: pack what fills blocks, and have room for
        at most `STEPS` units, whose scores are zero and whose source positions go on from
        `first_position`. They are packed when the next are asked for, or by `pack`."""
        self.store.pack()
        self.store.residual = self.store.residual.with_room(min(room, STEPS))
        self._exact = self._exact.with_room(min(room, STEPS))
        scores, positions = self._exact.tensors
        number_spare(scores, positions, self.count, first_position)

    def note_written(self) -> None:
        """A unit was written to the residual."""
        self.store.residual.count += 1
        self._exact.count += 1

    def replace_scores(self, scores: Tensor) -> None:
        """Give the units held other `scores` [B, H, S]."""
        self._exact.replace(0, scores)

    def view(self) -> PackedView:
        """What is held now, for `restore`."""
        return PackedView(self.store.view(), self._exact.view())

    def restore(self, view: PackedView) -> None:
        """Hold again what was held when `view` was taken."""
        self.store.restore(view.store)
        self._exact.restore(view.exact)

    def move(self, device: torch.device) -> None:
        """Be on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.named_tensors().items()}
        self.take_tensors(moved)

    def select_batch(self, rows: Tensor) -> None:
        """Hold only the batch rows `rows` [B'] (long); rows may repeat."""
        self.store.select_batch(rows)
        self._exact.select_batch(rows)

    def clear(self) -> None:
        self.store.clear()
        self._exact.clear()

    def named_tensors(self) -> dict[str, Tensor]:
        """What is held, by name, without spare room."""
        exact = dict(zip(EXACT, self._exact, strict=True)) if self.count else {}
        return exact | named_tensors(self.store)

    def take_tensors(self, named: dict[str, Tensor]) -> None:
        """Hold what `named_tensors` gave, which may be among other things."""
        self.store = store_of(self.store.scheme, named)
        self._exact = Buffers([named[name] for name in EXACT if name in named])

    @staticmethod
    def of_rows(rows: "Sequence[PackedStore]") -> "PackedStore":
        """The rows of a batch, of one row each, as one, aligned at their last unit."""
        stacked = PackedStore(rows[0].store.scheme)
        stacked.store = stack_stores([row.store for row in rows])
        stacked._exact = Buffers.stack([row._exact for row in rows])
        return stacked


def number_spare(scores: Tensor, positions: Tensor, filled: int, first_position: int) -> None:
    """Prepare scores (zero) and source positions of the units behind those held."""
    scores[:, :, filled:] = 0
    last = first_position + scores.shape[2] - filled
    positions[:, :, filled:] = torch.arange(first_position, last, device=positions.device)
