"""The cache units of one layer as they are: keys and values in full precision.

A cache unit is one token's key, value, score and source position in one KV head, and its weight
where evicted values are merged (`locret.cache.merging`). The tensors live and move together: there
is one append and one index, so they cannot drift apart.
`locret.cache.coded` is the same with keys and values in few bits.

Shapes: B batch, H KV heads, S units held, T new units, D head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from locret.cache.merging import Mergeable, Merged
from locret.quantization.buffers import Buffers, BuffersView

NAMES = ("keys", "values", "scores", "source_positions", "weights")


class NewUnits(NamedTuple):
    """Units to be added: keys and values [B, H, T, D], scores [B, H, T], positions [T] or
    [B, H, T], above all that are held."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor

    def prepared(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors as they are stored."""
        positions = self.positions.expand(self.keys.shape[:3])
        return self.keys, self.values, self.scores.float(), positions

    def first(self, count: int) -> "NewUnits":
        """The first `count` of them."""
        keys, values, scores = (x[:, :, :count] for x in self[:3])
        return NewUnits(keys, values, scores, self.positions[..., :count])


class Units:
    """Keys and values [B, H, S, D], scores [B, H, S] float32, source positions [B, H, S] long.

    Storage may be larger than what is held (`room`), so that decoding appends in place.

    Args:
        weighs: hold also how many tokens each unit's value is the mean of, [B, H, S] float32
            (`locret.cache.merging`): 1 for new units.
    """

    def __init__(self, weighs: bool = False) -> None:
        self.weighs = weighs
        self._columns = Buffers()

    @property
    def held(self) -> int:
        """S."""
        return self._columns.count

    @property
    def keys(self) -> Tensor:
        return self._columns[0]

    @property
    def values(self) -> Tensor:
        return self._columns[1]

    @property
    def scores(self) -> Tensor:
        return self._columns[2]

    @property
    def source_positions(self) -> Tensor:
        return self._columns[3]

    @property
    def weights(self) -> Tensor:
        """Of units that weigh."""
        return self._columns[4]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The storage itself, spare room included: what the memory is really spent on."""
        return self._columns.tensors

    @property
    def takes_steps(self) -> bool:
        """Whether `locret.engine.steps` can write new units in place and attend to all."""
        return True

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Storage [B, H, C, D] of keys and values, where new units are written behind `filled`."""
        return self.tensors[0], self.tensors[1]

    @property
    def filled(self) -> int:
        """Units in the tail: here, all."""
        return self.held

    @property
    def packed(self) -> None:
        """Units before the tail: here, none."""
        return None

    @property
    def spare(self) -> int:
        """Units that can be written in place."""
        return self._columns.capacity - self.held

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, spare room included."""
        return self._columns.nbytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the storage of keys and values alone."""
        return sum(tensor.nbytes for tensor in self.tensors[:2])

    @property
    def full_bytes(self) -> int:
        """Bytes of one token's keys and values as they come."""
        return sum(x[:, :, :1].nbytes for x in (self.keys, self.values)) if self.held else 0

    def append(
        self, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, room: int = 0
    ) -> None:
        """Add T new units after those held.

        Args:
            keys, values, scores, positions: see `NewUnits`; scores: higher = keep.
            room: when the storage must grow, how many units more than needed it takes.
        """
        self._columns.append(self._prepared(NewUnits(keys, values, scores, positions)), room)

    def append_selected(self, new: NewUnits, index: Tensor) -> None:
        """Hold those units at `index` [B, H, K] (long, ascending) that held and new ones are
        together; drop spare room. The units held and the new ones are never put side by side."""
        self._columns.append_selected(self._prepared(new), index)

    def _prepared(self, new: NewUnits) -> tuple[Tensor, ...]:
        """A tensor for each column."""
        weights = (torch.ones_like(new.scores, dtype=torch.float32),) if self.weighs else ()
        return *new.prepared(), *weights

    def mergeable(self, new: NewUnits | None = None) -> Mergeable:
        """Units that weigh, held and `new` ones together; one copy of them, if there are both."""
        columns = [*self._columns]
        if new is not None:
            fresh = self._prepared(new)
            pairs = zip(columns or [x[:, :, :0] for x in fresh], fresh, strict=True)
            columns = [torch.cat(pair, dim=2) for pair in pairs]
        keys, values, _, positions, weights = columns
        return Mergeable(keys, values, positions, weights)

    def replace_merged(self, merged: Merged) -> None:
        """Give the units held other values [B, H, S, D] and weights [B, H, S]."""
        self._columns.replace(1, merged.values)
        self._columns.replace(4, merged.weights)

    def select(self, index: Tensor) -> None:
        """Hold only the units at `index` [B, H, K] (long, ascending); drop spare room."""
        self._columns.select(index)

    def settle(self, tight: bool = False) -> None:
        """What was appended has been attended to. There is nothing to do."""

    def rebuild(self, keys: Tensor, room: int, empty: Tensor | None = None) -> None:
        """Hold the same units with other `keys` [B, H, S, D], in a storage with `room` to spare.
        The first `empty` [B, H] slots hold nothing."""
        self._columns = Buffers([keys, *list(self._columns)[1:]]).with_room(room)

    def replace_scores(self, scores: Tensor) -> None:
        """Give the units held other `scores` [B, H, S]."""
        self._columns.replace(2, scores)

    def make_room(self, room: int, first_position: int) -> None:
        """Let units be written to the tail in place: spare room, `room` units if there is none,
        whose scores are zero and whose source positions go on from `first_position`."""
        if not self.spare:
            self.rebuild(self.keys, room)
        _, _, scores, positions, *weights = self.tensors
        number_spare(scores, positions, self.held, first_position)
        for column in weights:
            column[:, :, self.held :] = 1

    def note_written(self) -> None:
        """A unit was written to the tail."""
        self._columns.count += 1

    def view(self) -> BuffersView:
        """What is held now, for `restore`."""
        return self._columns.view()

    def restore(self, view: BuffersView) -> None:
        """Hold again what was held when `view` was taken."""
        self._columns.restore(view)

    def move(self, device: torch.device) -> None:
        """Be on `device`."""
        self._columns.move(device)

    def select_batch(self, rows: Tensor) -> None:
        """Hold only the batch rows `rows` [B'] (long); rows may repeat."""
        self._columns.select_batch(rows)

    def clear(self) -> None:
        self._columns.clear()

    def named_tensors(self) -> dict[str, Tensor]:
        """What is held, by name, without spare room."""
        return dict(zip(NAMES, self._columns, strict=False)) if self.held else {}

    def take_tensors(self, named: dict[str, Tensor]) -> None:
        """Hold what `named_tensors` gave, which may be among other things."""
        self._columns = Buffers([named[name] for name in NAMES if name in named])

    @staticmethod
    def stack(rows: "Sequence[Units]") -> "Units":
        """The rows of a batch, of one row each, as one, aligned at their last unit."""
        stacked = Units(rows[0].weighs)
        stacked._columns = Buffers.stack([row._columns for row in rows])
        return stacked


def unscored(keys: Tensor) -> Tensor:
    """Scores [B, H, T] for units that no policy has scored and that are not to be evicted."""
    return torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)


def number_spare(scores: Tensor, positions: Tensor, held: int, first_position: int) -> None:
    """Prepare scores (zero) and source positions of the units behind those held."""
    scores[:, :, held:] = 0
    last = first_position + scores.shape[2] - held
    positions[:, :, held:] = torch.arange(first_position, last, device=positions.device)
