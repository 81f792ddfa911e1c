"""One layer of a compressed cache: the units it holds, and what it knows of tokens seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from locret.cache.coded import CodedUnits, LayerUnits, units_for
from locret.cache.host_blocks import HostBlocks
from locret.cache.recall import Recall
from locret.cache.units import NewUnits
from locret.quantization import NO_SCHEME, Scheme

_EVICTED = "evicted."
_ON_HOST = f"{_EVICTED}host."
"""How the names of evicted units begin among a layer's tensors."""


@dataclass(frozen=True)
class LayerView:
    """What a layer was at some moment."""

    units: Any
    seen: int
    rotated: bool
    empty: Tensor | None
    shift: tuple[int, ...]
    settled: int
    state: dict[str, Tensor]
    host: Any = None


class RetainedLayer(CacheLayerMixin):
    """The units of one layer and how many tokens it has seen.

    `keys`, `values` [B, H, S, D], `scores` [B, H, S] and `source_positions` [B, H, S] are views of
    what is held; keys and values in few bits are expanded each time. `rotated` says whether the
    keys already carry their rotation; where `stays_unrotated` they never do.

    `empty` [B, H] (long, on the keys' device) is how many leading slots of a row and head hold
    nothing, where rows of different lengths stand together; None = all slots are taken. `shift` is
    the same of each row, known to Python: a row's own slot 0 is the first that holds something.
    Where heads keep different numbers of units (`Policy.allot`), more of a head's slots are empty.
    `settled` is how many slots were held after the last eviction, 0 before the first.
    `state` is what a policy remembers of this layer and request, by name.
    `host` holds what was evicted, for recall; None = what is evicted is gone.

    A layer with a `window` attends to so many tokens, the newest included: it holds the last
    window - 1 units, unrotated, whatever the budget and the positions are.

    Units hold weights (`locret.cache.units`) if the layer `merges` evicted values.
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
        self.units: LayerUnits = units_for(scheme, merges and window is None)
        self.stays_unrotated = scheme.packs and scheme.keys_are == "unrotated"
        self.seen = 0
        rotated = rotated and window is None
        self.rotated = rotated
        self.window = window
        self.empty: Tensor | None = None
        self.shift: tuple[int, ...] = (0,)
        self.settled = 0
        self.state: dict[str, Tensor] = {}
        self.host = HostBlocks(recall) if recall is not None and window is None else None
        self._rotated_at_first = rotated
        self._handed_over = False

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
    def held(self) -> int:
        """Units held in each head."""
        return self.units.held

    @property
    def quantized(self) -> bool:
        """Whether keys and values are held in few bits."""
        return isinstance(self.units, CodedUnits)

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
        if self.held:
            self.units.rebuild(rotate(self.keys), room, self.empty)
        self.rotated = True

    def note_evicted(self, count: int, empty: Tensor | None = None) -> None:
        """`count` slots were given up in every head; those that held nothing went first.

        `empty` [B, H] says how many leading slots hold nothing now, where heads differ.
        """
        self.settled = self.held
        if empty is not None:
            self.empty = empty
            firsts = tuple(empty.amin(dim=1).tolist())
            self.shift = firsts if len(set(firsts)) > 1 else firsts[:1]
        elif self.empty is not None:
            self.empty = (self.empty - count).clamp(min=0)
            self.shift = tuple(max(empty - count, 0) for empty in self.shift)

    def recall_evicted(
        self, kept: Tensor, fillers: Tensor | None, new: NewUnits | None = None
    ) -> None:
        """Before an eviction: give what is not kept to `host`, if evicted units are recalled.

        Args:
            kept: indices [B, H, K] (long, ascending) of units held and `new` ones together.
            fillers: how many leading ones of a head's `kept` keep nothing; None = none.
            new: units that are not held yet; None = none.
        """
        if self.host is None:
            return
        held = (self.keys, self.values, self.source_positions) if self.held else None
        coming = None if new is None else (*new.prepared()[:2], new.prepared()[3])
        some = held or coming
        assert some is not None
        none = tuple(column[:, :, :0] for column in some)
        self.host.take(held or none, coming or none, kept, fillers, self.empty)

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
        if self.held and self.scores.device != device:
            self.units.move(device)
            if self.host:
                self.host.move(device)
        if self.empty is not None and self.empty.device != device:
            self.empty = self.empty.to(device)
        self.state = {name: value.to(device) for name, value in self.state.items()}

    def view(self) -> LayerView:
        return LayerView(
            self.units.view(),
            self.seen,
            self.rotated,
            self.empty,
            self.shift,
            self.settled,
            dict(self.state),
            self.host.view() if self.host else None,
        )

    def restore(self, view: LayerView) -> None:
        self.units.restore(view.units)
        self.seen, self.rotated = view.seen, view.rotated
        self.empty, self.shift, self.settled = view.empty, view.shift, view.settled
        self.state = dict(view.state)
        if self.host:
            self.host.restore(view.host)

    def named_tensors(self) -> dict[str, Tensor]:
        """All that the layer holds, without spare room."""
        named = self.units.named_tensors()
        if self.empty is not None:
            named["empty"] = self.empty
        if self.host:
            named |= {f"{_EVICTED}{name}": x for name, x in self.host.named_tensors().items()}
        return named | {f"state.{name}": value for name, value in self.state.items()}

    def take_tensors(self, named: dict[str, Tensor], device: Any) -> None:
        """Hold what `named_tensors` gave, on `device` but for what waits on the host; the layer is
        new."""
        named = {
            name: tensor if name.startswith(_ON_HOST) else tensor.to(device)
            for name, tensor in named.items()
        }
        self.units.take_tensors(named)
        self.empty = named.get("empty")
        if self.host:
            self.host.take_tensors(
                {
                    name.removeprefix(_EVICTED): value
                    for name, value in named.items()
                    if name.startswith(_EVICTED)
                }
            )
        self.state = {
            name.removeprefix("state."): value
            for name, value in named.items()
            if name.startswith("state.")
        }

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
        self.seen = 0
        self.empty, self.shift, self.settled = None, (0,), 0
        self.state = {}
        self.rotated = self._rotated_at_first
        if self.host:
            self.host.clear()

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
        if self.held:
            indices = indices.to(self.scores.device)
            self.units.select_batch(indices)
            if self.host:
                self.host.select_batch(indices, known)
        if self.empty is not None:
            self.empty = self.empty[indices.to(self.empty.device)]
        if len(self.shift) > 1:
            self.shift = tuple(self.shift[row] for row in known)
        self.state = {name: x[indices.to(x.device)] for name, x in self.state.items()}

    def take_rows(
        self, rows: "Sequence[RetainedLayer]", num_heads: int, device: torch.device
    ) -> None:
        """Hold layers of one row each as one batch, aligned at their last unit. Empties `rows`, so
        that one layer at a time is held twice; this one is new."""
        units: Any = [row.units for row in rows]
        self.units = type(self.units).stack(units)
        # A row without a context has read nothing, and was never asked to rotate it.
        self.rotated = next((row.rotated for row in rows if row.held), rows[0].rotated)
        self.settled = max(row.settled for row in rows)
        self.empty = _stack_empty(rows)
        self.shift = tuple(row.shift[0] for row in rows)
        self.add_empty([self.held - row.held for row in rows], num_heads, device)
        self.state = _stack_states([row.state for row in rows])
        if self.host:
            self.host = HostBlocks.stack([row.host for row in rows if row.host])
        for row in rows:
            row.units.clear()
            if row.host:
                row.host.clear()


def _stack_empty(rows: "Sequence[RetainedLayer]") -> Tensor | None:
    """[B, H] where heads of some row keep different numbers of units; None = nowhere."""
    like = next((row.empty for row in rows if row.empty is not None), None)
    if like is None:
        return None
    return torch.cat([torch.zeros_like(like) if row.empty is None else row.empty for row in rows])


def _stack_states(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What policies remember of rows, as one batch; zeros for rows that remember nothing."""
    some: dict[str, Tensor] = {}
    for row in rows:
        some = row | some
    return {
        name: torch.cat([row.get(name, torch.zeros_like(like)) for row in rows])
        for name, like in some.items()
    }
