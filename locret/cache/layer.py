"""One layer of a compressed cache: the units it holds, and what it knows of tokens seen.

A cache unit is one token's key, value, score and source position in one KV head, and its weight
where evicted values are merged (`locret.cache.merging`). `PlainStore` holds them as they are,
`locret.cache.packed` keys and values in few bits; the tensors of a layer live and move together,
so that they cannot drift apart.

Shapes: B batch, H KV heads, S units held, T new units, K units that stay, D head size.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from locret.cache.host_blocks import HostBlocks
from locret.cache.merging import Mergeable, Merging, merge_evicted
from locret.cache.packed import PackedStore, number_spare
from locret.cache.recall import Recall
from locret.quantization import NO_SCHEME, Scheme
from locret.quantization.buffers import Buffers

NAMES = ("keys", "values", "scores", "source_positions", "weights")


class NewTokens(NamedTuple):
    """Units to be added, as they are stored: keys and values [B, H, T, D], scores [B, H, T] float32
    (higher = keep), source positions [B, H, T] long, above all that are held."""

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
        return cls(keys, values, scores, positions.expand(keys.shape[:3]))

    def first(self, count: int) -> "NewTokens":
        """The first `count` of them."""
        return NewTokens(*(x[:, :, :count] for x in self))


class PlainStore(Buffers):
    """Keys and values [B, H, S, D], scores [B, H, S] float32, source positions [B, H, S] long.

    Args:
        weighs: hold also how many tokens each unit's value is the mean of, [B, H, S] float32
            (`locret.cache.merging`): 1 for new units.
        storage: the tensors to begin with.

    Attributes:
        takes_steps: whether `locret.engine.steps` can write new units in place and attend to all.
        packed: units before the tail: here, none.
    """

    takes_steps = True
    packed = None

    def __init__(self, weighs: bool = False, storage: Sequence[Tensor] = ()) -> None:
        super().__init__(storage)
        self.weighs = weighs

    @property
    def keys(self) -> Tensor:
        return self[0]

    @property
    def values(self) -> Tensor:
        return self[1]

    @property
    def scores(self) -> Tensor:
        return self[2]

    @property
    def source_positions(self) -> Tensor:
        return self[3]

    @property
    def weights(self) -> Tensor:
        """Of units that weigh."""
        return self[4]

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Storage [B, H, C, D] of keys and values, where new units are written behind `filled`."""
        return self.tensors[0], self.tensors[1]

    @property
    def filled(self) -> int:
        """Units in the tail: here, all."""
        return self.count

    @property
    def spare(self) -> int:
        """Units that can be written in place."""
        return self.capacity - self.count

    @property
    def kv_bytes(self) -> int:
        """Bytes of the storage of keys and values alone."""
        return sum(tensor.nbytes for tensor in self.tensors[:2])

    @property
    def full_bytes(self) -> int:
        """Bytes of one token's keys and values as they come."""
        return sum(x[:, :, :1].nbytes for x in (self.keys, self.values)) if self.count else 0

    def append(self, new: Sequence[Tensor], room: int = 0) -> None:
        super().append(self._weighed(new), room)

    def append_selected(self, new: Sequence[Tensor], index: Tensor) -> None:
        super().append_selected(self._weighed(new), index)

    def _weighed(self, new: Sequence[Tensor]) -> Sequence[Tensor]:
        return (*new, torch.ones_like(new[2])) if self.weighs else new

    def replace_scores(self, scores: Tensor) -> None:
        """Give the units held other `scores` [B, H, S]."""
        self.replace(2, scores)

    def pack(self, tight: bool = False) -> None:
        """What was appended has been attended to. There is nothing to pack."""

    def rebuild(self, keys: Tensor, room: int, empty: Tensor | None = None) -> None:
        """Hold the same units with other `keys` [B, H, S, D], in a storage with `room` to spare.
        The first `empty` [B, H] slots hold nothing."""
        stored = [keys, *list(self)[1:]]
        self.clear()
        super().append(stored, room)

    def make_room(self, room: int, first_position: int) -> None:
        """Let units be written to the tail in place: spare room, `room` units if there is none,
        whose scores are zero and whose source positions go on from `first_position`."""
        if not self.spare:
            self.rebuild(self.keys, room)
        _, _, scores, positions, *weights = self.tensors
        number_spare(scores, positions, self.count, first_position)
        for tensor in weights:
            tensor[:, :, self.count :] = 1

    def note_written(self) -> None:
        """A unit was written to the tail."""
        self.count += 1

    def named_tensors(self) -> dict[str, Tensor]:
        """What is held, by name, without spare room."""
        return dict(zip(NAMES, self, strict=False)) if self.count else {}

    def take_tensors(self, named: dict[str, Tensor]) -> None:
        """Hold what `named_tensors` gave, which may be among other things."""
        self._replace(tuple(named[name] for name in NAMES if name in named))

    @staticmethod
    def of_rows(rows: "Sequence[PlainStore]") -> "PlainStore":
        """The rows of a batch, of one row each, as one, aligned at their last unit."""
        return PlainStore(rows[0].weighs, Buffers.stack(rows).tensors)


def unscored(keys: Tensor) -> Tensor:
    """Scores [B, H, T] for units that no policy has scored and that are not to be evicted."""
    return torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)


_VALUES = ("seen", "rotated", "empty", "shift", "after_eviction")
"""What a view of a layer holds beside units, state and what waits on the host."""


class RetainedLayer(CacheLayerMixin):
    """The units of one layer and how many tokens it has seen.

    `keys`, `values` [B, H, S, D], `scores` [B, H, S] and `source_positions` [B, H, S] are views of
    what is held; keys and values in few bits are expanded each time. `rotated` says whether the
    keys already carry their rotation; where `stays_unrotated` they never do.

    `empty` [B, H] (long, on the keys' device) is how many leading slots of a row and head hold
    nothing, where rows of different lengths stand together; None = all slots are taken. `shift` is
    the same of each row, known to Python: a row's own slot 0 is the first that holds something.
    Where heads keep different numbers of units (`Policy.allot`), more of a head's slots are empty.
    `after_eviction` is how many slots were taken after the last eviction, 0 before the first.
    `state` is what a policy remembers of this layer and request, by name.
    `host` holds what was evicted, for recall; None = what is evicted is gone. Units hold weights if
    the layer `merges` evicted values.

    A layer with a `window` attends to so many tokens, the newest included: it holds the last
    window - 1 units, unrotated, whatever the budget and the positions are.
    """

    is_sliding = False
    is_croppable = False

    def __init__(
        self,
        rotated: bool,
        window: int | None = None,
        scheme: Scheme = NO_SCHEME,
        merges: bool = False,
        recall: Recall | None = None,
    ) -> None:
        # The base class would make keys and values plain attributes; here they are views.
        self.units: PlainStore | PackedStore = (
            PackedStore(scheme) if scheme.packs else PlainStore(merges and window is None)
        )
        self.stays_unrotated = scheme.packs and scheme.keys_are == "unrotated"
        self.window = window
        self.host = HostBlocks(recall) if recall is not None and window is None else None
        self._rotated_at_first = rotated and window is None
        self._handed_over = False
        self._start_anew()

    def _start_anew(self) -> None:
        self.seen = 0
        self.rotated = self._rotated_at_first
        self.empty: Tensor | None = None
        self.shift: tuple[int, ...] = (0,)
        self.after_eviction = 0
        self.state: dict[str, Tensor] = {}

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self.units.keys

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.units.values

    @property
    def scores(self) -> Tensor:
        return self.units.scores

    @property
    def source_positions(self) -> Tensor:
        return self.units.source_positions

    @property
    def is_initialized(self) -> bool:
        return self.seen > 0

    @property
    def slots(self) -> int:
        """Slots taken in each head, by units but for those that are `empty`."""
        return self.units.count

    @property
    def quantized(self) -> bool:
        """Whether keys and values are held in few bits."""
        return isinstance(self.units, PackedStore)

    @property
    def nbytes(self) -> int:
        """Bytes of all storage on the device."""
        return self.units.nbytes + (self.host.nbytes if self.host else 0)

    @property
    def takes_steps(self) -> bool:
        """Whether `locret.engine.steps` can run one-token steps of this layer."""
        return self.units.takes_steps and self.host is None

    def get_seq_length(self) -> int:
        """Tokens seen, not units held."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is made by the first append; there is nothing to do before."""

    def freeze(self, rotate: Callable[[Tensor], Tensor], room: int) -> None:
        """From here on slots do not move: rotate the keys once, where they stand.

        Args:
            rotate: the rotation of keys [B, H, S, D] at their slots.
            room: units that are expected to come.
        """
        if self.rotated or self.stays_unrotated:
            return
        if self.slots:
            self.units.rebuild(rotate(self.keys), room, self.empty)
        self.rotated = True

    def evict(
        self,
        kept: Tensor,
        fillers: Tensor | None = None,
        new: NewTokens | None = None,
        merging: Merging | None = None,
        query: int = 0,
    ) -> None:
        """Hold what is kept of the units held and the `new` ones.

        Args:
            kept: indices [B, H, K] long, ascending.
            fillers: how many leading ones of a head's `kept` stand for nothing, [B, H] long; None =
                those that were empty before, as far as they are still there.
            new: units that are not held yet; None = none.
            merging: how the values of the others are merged into them; None = they are lost.
            query: first tokens that nothing is merged into: a question read in front.
        """
        if self.host is not None:
            self._give_to(self.host, kept, fillers, new)
        units, merged = self.units, None
        count = self.slots - kept.shape[2] + (new.keys.shape[2] if new else 0)
        if merging is not None and isinstance(units, PlainStore):
            if new is not None:
                units.append(new)
                new = None
            before = Mergeable(units.keys, units.values, units.source_positions, units.weights)
            still_empty = None if self.empty is None else (self.empty - count).clamp(min=0)
            first = still_empty if fillers is None else fillers
            merged = merge_evicted(
                before, kept, merging, empty=self.empty, fillers=first, query=query
            )
        if new is None:
            units.select(kept)
        else:
            units.append_selected(new, kept)
        if merged is not None and isinstance(units, PlainStore):
            units.replace(1, merged.values)
            units.replace(4, merged.weights)
        self.note_evicted(count, fillers)

    def _give_to(
        self, host: HostBlocks, kept: Tensor, fillers: Tensor | None, new: NewTokens | None
    ) -> None:
        """Before an eviction: what is not kept goes to the host."""
        context = (self.keys, self.values, self.source_positions) if self.slots else None
        coming = None if new is None else (new.keys, new.values, new.positions)
        none = tuple(x[:, :, :0] for x in context or coming or ())
        host.take(context or none, coming or none, kept, fillers, self.empty)

    def note_evicted(self, count: int, empty: Tensor | None = None) -> None:
        """`count` slots were given up in every head; those that held nothing went first. `empty`
        [B, H]: how many leading slots hold nothing now, where heads differ."""
        self.after_eviction = self.slots
        if empty is not None:
            self.empty = empty
            firsts = tuple(empty.amin(dim=1).tolist())
            self.shift = firsts if len(set(firsts)) > 1 else firsts[:1]
        elif self.empty is not None:
            self.empty = (self.empty - count).clamp(min=0)
            self.shift = tuple(max(empty - count, 0) for empty in self.shift)

    def add_empty(self, rows: Sequence[int], num_heads: int, device: torch.device) -> None:
        """So many more leading slots of each row hold nothing."""
        before = self.shift if len(self.shift) == len(rows) else self.shift * len(rows)
        self.shift = tuple(old + more for old, more in zip(before, rows, strict=True))
        more = torch.tensor(rows, device=device)[:, None].repeat(1, num_heads)
        self.empty = more if self.empty is None else self.empty + more

    def own_slots(self, slot: int) -> tuple[int, ...]:
        """What slot `slot` is in each row's own count, or one number if they agree."""
        return tuple(slot - empty for empty in self.shift)

    def place(self, device: torch.device) -> None:
        """Be on the layer's device, wherever the tensors came from."""
        if self.slots and self.scores.device != device:
            self.units.move(device)
            if self.host:
                self.host.move(device)
        if self.empty is not None and self.empty.device != device:
            self.empty = self.empty.to(device)
        self.state = {name: value.to(device) for name, value in self.state.items()}

    def view(self) -> SimpleNamespace:
        """What the layer is now, for `restore`. Nothing is copied."""
        values = {name: getattr(self, name) for name in _VALUES} | {"state": dict(self.state)}
        return SimpleNamespace(
            **values, units=self.units.view(), host=self.host and self.host.view()
        )

    def restore(self, view: SimpleNamespace) -> None:
        """Be again what the layer was when `view` was taken."""
        self.units.restore(view.units)
        self.state = dict(view.state)
        if self.host:
            self.host.restore(view.host)
        for name in _VALUES:
            setattr(self, name, getattr(view, name))

    def expect_hand_over(self) -> None:
        """Let the next `update` pass: its caller's keys and values go to our attention function."""
        self._handed_over = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values on to the attention function, which stores them.

        Raises:
            ValueError: the model is not attached, so keys would arrive rotated and unscored.
        """
        if not self._handed_over:
            raise ValueError(
                "a RetainedCache was given to a model that no engine is attached to; "
                "call engine.generate(..., cache=cache), or model.generate inside `with engine:`"
            )
        self._handed_over = False
        return key_states, value_states

    def reset(self) -> None:
        self.units.clear()
        if self.host:
            self.host.clear()
        self._start_anew()

    def crop(self, tokens_to_remove: int) -> None:
        """Evicted units cannot be brought back, so nothing can be cropped.

        Raises:
            ValueError: `tokens_to_remove` is not zero.
        """
        if tokens_to_remove:
            raise ValueError(
                "a RetainedCache cannot be rolled back; use a decoding method that does not "
                "draft tokens (greedy, sampling, beam search)"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        asked = len(self.shift) > 1 or self.host is not None
        self.select_rows(indices, indices.tolist() if asked else ())

    def select_rows(self, indices: Tensor, known: Sequence[int]) -> None:
        """Hold only the rows `indices` [B'] (long) of the batch, which Python knows as `known`: a
        device is not asked."""
        if self.slots:
            indices = indices.to(self.scores.device)
            self.units.select_batch(indices)
            if self.host:
                self.host.select_batch(indices, known)
        if self.empty is not None:
            self.empty = self.empty[indices.to(self.empty.device)]
        if len(self.shift) > 1:
            self.shift = tuple(self.shift[row] for row in known)
        self.state = {name: x[indices.to(x.device)] for name, x in self.state.items()}
