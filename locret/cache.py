"""The compressed cache of one request: a transformers `Cache` that holds a bounded set of units.

`get_seq_length()` is the number of tokens **seen**, so stock `generate()` slices its inputs
rightly; the number of units **held** is separate and stays within the budget while a prompt is
read. Everything a request needs to go on is here; nothing of it is kept on the model.

Positions (`Positions`):
  compact   units held fill the slots 0 .. S-1 in order, and keys are stored unrotated until
            decoding begins; as released. Any input length fits the backbone's window.
  original  keys are rotated once, at their source position; bounded by the backbone's window.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from locret import saved
from locret.coded import CodedUnits, LayerUnits, units_for
from locret.merging import Merging, describe_merging, merging_of
from locret.quantization import NO_SCHEME, SCHEMES, Scheme, describe_scheme, scheme_of
from locret.recall import HostBlocks, Recall
from locret.units import NewUnits

Positions = Literal["compact", "original"]

DECODE_ROOM = 256  # units of spare storage a growing layer takes, so that decoding appends in place


@dataclass(frozen=True)
class Eviction:
    """What layers do after attending: keep `budgets[layer]` units.

    The last `stabilizers` units and the first `query` ones are among them whatever they scored.
    A layer evicts when it holds more than `slack` units above its budget. The last `drop` tokens
    of the chunk are read for the policy to see and not kept: a question that will be asked later.
    The values of evicted units are merged into others by the rule `merging`; None = they are lost.
    """

    budgets: tuple[int, ...]
    stabilizers: int
    query: int = 0
    slack: int = 0
    drop: int = 0
    merging: Merging | None = None

    def protected(self, layer_idx: int, recent: int = 0) -> tuple[int, int]:
        """Protected units at the (tail, head) of a layer, the policy's `recent` ones included: a
        small budget protects fewer."""
        head = min(self.query, self.budgets[layer_idx])
        return min(max(self.stabilizers, recent), self.budgets[layer_idx] - head), head


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


@dataclass(frozen=True)
class Snapshot:
    """What a cache was at some moment (`RetainedCache.snapshot`). It holds no copy of the units."""

    layers: tuple[LayerView, ...]
    fields: dict[str, Any]


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

    Units hold weights (`locret.units`) if the layer `merges` evicted values.
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
    def nbytes(self) -> int:
        """Bytes of all storage on the device."""
        return self.units.nbytes + (self.host.nbytes if self.host else 0)

    @property
    def takes_steps(self) -> bool:
        """Whether `locret.steps` can run one-token steps of this layer."""
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

    def evict(self, index: Tensor) -> None:
        """Hold only the units at `index` [B, H, K] (long, ascending)."""
        before = self.held
        self.units.select(index)
        self.note_evicted(before - self.held)

    def note_evicted(self, count: int, empty: Tensor | None = None) -> None:
        """`count` slots were given up in every head; those that held nothing went first.

        `empty` [B, H] says how many leading slots hold nothing now, where heads differ.
        """
        self.settled = self.held
        if empty is not None:
            self.empty = empty
            self.shift = tuple(max(slots - count, 0) for slots in self.shift)
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

    def take_tensors(self, named: dict[str, Tensor]) -> None:
        """Hold what `named_tensors` gave; the layer is new."""
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
            rows = indices.to(self.scores.device)
            self.units.select_batch(rows)
            if self.empty is not None:
                self.empty = self.empty[rows]
                if len(self.shift) > 1:
                    self.shift = tuple(self.shift[row] for row in known)
            self.state = {name: value[rows] for name, value in self.state.items()}
            if self.host:
                self.host.select_batch(rows, known)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.held:
            rows = torch.arange(self.scores.shape[0], device=self.scores.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


class RetainedCache(Cache):
    """The cache of one request.

    Args:
        num_layers: layers of the backbone.
        budget: units a KV head keeps while the prompt is read, or those of every layer; None = all.
        positions: see the file's head.
        windows: the sliding window of each layer (`RetainedLayer`), None for those without; empty =
            no layer has one.
        scheme: how keys and values are stored, but for layers with a window: they hold theirs as
            they are.
        merging: how the values of evicted units are merged into others; None = they are lost.
        recall: what comes back of evicted units (`locret.recall`); None = nothing. Does not go with
            merging.

    Attributes:
        eviction: what layers do after attending now; None = nothing is evicted.
        room: units expected to come after the prompt was read, for which storage is made at once.
        prompt_lengths: tokens of each row's first prompt (they decide LongRoPE's `by_length`
            rule); one for all rows if they agree.
        query_length: tokens of the question that were read in front of the prompt (Locret-Q).
        token_ids: [B, seen] long, on the CPU: the tokens read so far, evicted ones included; rows
            of a batch are padded on the left.
        unread_ids: [B, 0 or 1] long, on the CPU: the last token of the answer, which ends a call
            without being read; the next turn reads it first.
        padding: how many leading tokens of each row are padding; None = none.
        takes_in: a chunk of a context is read, and its output is not wanted.
        steps: computes the layers of a one-token step just now (`locret.steps`); else None.
        model: what the cache belongs to (`locret.saved.describe`), for `save`.
    """

    layers: list[RetainedLayer]  # type: ignore[assignment]

    def __init__(
        self,
        num_layers: int,
        budget: int | tuple[int, ...] | None = None,
        positions: Positions = "compact",
        windows: Sequence[int | None] = (),
        scheme: Scheme = NO_SCHEME,
        merging: Merging | None = None,
        recall: Recall | None = None,
    ) -> None:
        if positions not in get_args(Positions):
            raise ValueError(f"positions is {positions!r}; expected 'compact' or 'original'")
        if positions == "original" and scheme.packs and scheme.keys_are == "unrotated":
            raise ValueError(
                f"quantization {scheme.name!r} holds keys before their rotation and original "
                "positions hold them after it; use positions='compact', or another quantization"
            )
        if merging is not None and scheme.packs:
            raise ValueError(
                f"merging changes values of units that stay, and quantization {scheme.name!r} does "
                "not encode again what it has packed, so that errors never add up; leave one out"
            )
        if recall is not None and scheme.packs:
            raise ValueError(
                f"recall keeps evicted units as they are in host memory and quantization "
                f"{scheme.name!r} has only codes of them; leave one of the two out"
            )
        if recall is not None and merging is not None:
            raise ValueError(
                "merging keeps what is evicted in units that stay and recall brings it back, so "
                "that it would count twice; leave one of the two out"
            )
        super().__init__(
            layers=[
                RetainedLayer(
                    positions == "original",
                    window,
                    of_layer,
                    merges=merging is not None,
                    recall=recall,
                )
                for window, of_layer in _layer_schemes(windows or [None] * num_layers, scheme)
            ]
        )
        self.scheme = scheme
        self.merging = merging
        self.recall = recall
        self.budget = budget
        self.positions = positions
        self.model: dict[str, Any] = {}
        self.takes_in = False
        self.steps: Any = None
        self._start_anew()

    def _start_anew(self) -> None:
        self.eviction: Eviction | None = None
        self.room = DECODE_ROOM
        self.prompt_lengths: tuple[int, ...] = (0,)
        self.query_length = 0
        self.token_ids: Tensor | None = None
        self.unread_ids = torch.empty(0, 0, dtype=torch.long)
        self.padding: tuple[int, ...] | None = None

    def shifted(self, column: int) -> tuple[int, ...]:
        """The position of token `column` in each row, or one for all rows if they agree."""
        if self.padding is None:
            return (column,)
        return tuple(column - padding for padding in self.padding)

    def __bool__(self) -> bool:
        """False, so that stock Phi-3 keeps the cache; ask `cache is None` or `cache.seen` instead.

        Phi-3's generation code drops a true cache, to read everything again, when a sequence grows
        past LongRoPE's original window. Here the factors are fixed for a request: nothing has to be
        read again, and what was evicted could not be. No other stock code asks.
        """
        return False

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self.get_seq_length()

    @property
    def quantized(self) -> bool:
        """Whether any layer holds keys and values in few bits."""
        return any(isinstance(layer.units, CodedUnits) for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all storage on the device: keys and values or their codes, tables and outliers,
        scores, positions, spare room; what is recalled, and what finds it."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def hosts(self) -> list[HostBlocks]:
        """The evicted units of the layers that recall them."""
        return [layer.host for layer in self.layers if layer.host is not None]

    @property
    def retained_layers(self) -> list[RetainedLayer]:
        """The layers that a budget bounds, not a sliding window."""
        return [layer for layer in self.layers if layer.window is None]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer; None for those without."""
        return tuple(layer.window for layer in self.layers)

    def reset(self) -> None:
        super().reset()
        self._start_anew()

    def snapshot(self) -> Snapshot:
        """What the cache is now, to come back to with `restore`: ask a question, restore, ask the
        next one. Nothing is copied; the storage lives as long as the snapshot or the cache."""
        fields = {name: copy.copy(getattr(self, name)) for name in _FIELDS}
        return Snapshot(tuple(layer.view() for layer in self.layers), fields)

    def restore(self, snapshot: Snapshot) -> None:
        """Be again what the cache was when `snapshot` was taken of it.

        Raises:
            ValueError: a snapshot of a cache with another number of layers.
        """
        if len(snapshot.layers) != len(self.layers):
            raise ValueError(
                f"the snapshot is of a cache of {len(snapshot.layers)} layers; this one has "
                f"{len(self.layers)}. Restore it where it was taken"
            )
        for layer, view in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(view)
        for name, value in snapshot.fields.items():
            setattr(self, name, copy.copy(value))

    def save(self, path: str | Path) -> None:
        """Write the context to the folder `path`: safetensors and JSON (`locret.saved`).

        Raises:
            ValueError: nothing was read yet, the path is taken by something else, or a scheme of
                your own that `locret.quantization.SCHEMES` does not know stores the units.
        """
        if not self.seen or self.token_ids is None:
            raise ValueError("the cache holds no context to save, or one that beams have mixed up")
        if SCHEMES.get(self.scheme.name) is not type(self.scheme):
            raise ValueError(
                f"{type(self.scheme).__name__} is not in locret.quantization.SCHEMES, where "
                "loading looks for it; add it there under its name"
            )
        tensors = {"token_ids": self.token_ids, "unread_ids": self.unread_ids}
        for i, layer in enumerate(self.layers):
            tensors |= {f"{i}.{name}": tensor for name, tensor in layer.named_tensors().items()}
        record = {name: getattr(self, name) for name in _RECORDED}
        record |= {
            "seen": [layer.seen for layer in self.layers],
            "rotated": [layer.rotated for layer in self.layers],
            "windows": list(self.windows),
            "quantization": describe_scheme(self.scheme),
            "merging": describe_merging(self.merging),
            "recall": dataclasses.asdict(self.recall) if self.recall else None,
            "shift": [layer.shift for layer in self.layers],
            "settled": [layer.settled for layer in self.layers],
        }
        saved.write(path, record, tensors)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "RetainedCache":
        """The context saved at `path`, to be used with `model`, which it was read with.

        Raises:
            ValueError: no context there, a damaged one, or one of another model; says which.
        """
        stock = model.get_base_model() if hasattr(model, "get_base_model") else model
        record, tensors = saved.read(path, stock)
        recall = record.get("recall")
        # Layers that are elsewhere take their units there when they run.
        device = "cpu" if stock.device.type == "meta" else stock.device
        cache = cls(
            len(record["seen"]),
            positions=record["positions"],
            windows=record.get("windows", ()),
            scheme=scheme_of(record.get("quantization")),
            merging=merging_of(record.get("merging")),
            recall=Recall(**recall) if recall else None,
        )
        for name in _RECORDED:
            value = record[name]
            setattr(cache, name, tuple(value) if isinstance(value, list) else value)
        cache.token_ids, cache.unread_ids = tensors.pop("token_ids"), tensors.pop("unread_ids")
        for i, layer in enumerate(cache.layers):
            layer.seen, layer.rotated = record["seen"][i], record["rotated"][i]
            layer.shift, layer.settled = tuple(record["shift"][i]), record["settled"][i]
            start = f"{i}."
            layer.take_tensors(
                {
                    name.removeprefix(start): tensor
                    if name.startswith(f"{start}{_IN_HOST_MEMORY}")
                    else tensor.to(device)
                    for name, tensor in tensors.items()
                    if name.startswith(start)
                }
            )
        return cache

    def _emptied(self) -> "RetainedCache":
        """A cache of the same settings and model that has read nothing."""
        made = type(self)(
            len(self.layers),
            self.budget,
            self.positions,
            self.windows,
            self.scheme,
            merging=self.merging,
            recall=self.recall,
        )
        made.model = self.model
        return made

    @classmethod
    def stack(
        cls, rows: "Sequence[RetainedCache]", padded_to: int, num_heads: int, device: torch.device
    ) -> "RetainedCache":
        """Caches of one row each as one batch, aligned at their last unit. Empties `rows`.

        Args:
            rows: caches of the same settings, that of a padded row with its `padding`.
            padded_to: tokens of the longest row; shorter ones count as padded on the left.
            num_heads: KV heads of the backbone.
            device: where the new tensors go.
        """
        first = rows[0]
        batch = first._emptied()
        batch.query_length = first.query_length
        batch.prompt_lengths = tuple(row.prompt_lengths[0] for row in rows)
        batch.padding = tuple(padded_to - row.shifted(row.seen)[0] for row in rows)
        for layer, *of_rows in zip(batch.layers, *(row.layers for row in rows), strict=True):
            units: Any = [each.units for each in of_rows]
            layer.units, layer.seen = type(layer.units).stack(units), padded_to
            layer.rotated = of_rows[0].rotated
            empty = [layer.held - each.held for each in of_rows]
            layer.settled = max(each.settled for each in of_rows)
            layer.empty = _stack_empty(of_rows)
            layer.shift = tuple(each.shift[0] for each in of_rows)
            layer.add_empty(empty, num_heads, device)
            layer.state = _stack_states([each.state for each in of_rows])
            if layer.host:
                layer.host = HostBlocks.stack([each.host for each in of_rows if each.host])
            for each in of_rows:
                each.units.clear()  # one layer at a time is held twice, not the whole batch
                if each.host:
                    each.host.clear()
        return batch

    def rows(self, indices: Sequence[int]) -> "RetainedCache":
        """Some rows as a cache of their own; this one stays as it is."""
        part = self._emptied()
        part.restore(self.snapshot())
        device = next((layer.scores.device for layer in self.layers if layer.held), None)
        on_device = torch.tensor(indices, device=device)
        for layer in part.layers:
            layer.select_rows(on_device, indices)
        if len(self.prompt_lengths) > 1:
            part.prompt_lengths = tuple(self.prompt_lengths[i] for i in indices)
        if self.padding is not None:
            part.padding = tuple(self.padding[i] for i in indices)
        if self.token_ids is not None:
            part.token_ids = self.token_ids[list(indices)]
            part.unread_ids = self.unread_ids[list(indices)]
        return part

    def report(self) -> dict[str, Any]:
        """What is held, in units and real bytes, against what a full cache would take.

        Returns:
            `seen_tokens`, `budget`, `positions`, `quantization` (None or the scheme with its
            options), `merging` (likewise), per layer `windows` (None where the budget holds),
            `units` (held in each head) and `bytes` (storage of keys, values, their scales and
            outliers, scores, positions, weights, spare room), their sum `total_bytes`, `kv_bytes`
            (the part of it for keys and values), `full_cache_bytes` (keys and values of every token
            seen, or of a window) and `ratio` = total / full. `recall` is None, or its options with
            `host_units` (evicted), `host_bytes` and `recalled_units` (attended to beside `units` in
            the last step or chunk), all in the layer or head that has most but for the bytes, which
            are of all; what it takes of the device is part of `bytes`.
        """
        full = sum(
            layer.units.full_bytes * min(layer.seen, layer.window or layer.seen)
            for layer in self.layers
        )
        return {
            "seen_tokens": self.seen,
            "budget": self.budget,
            "positions": self.positions,
            "quantization": describe_scheme(self.scheme) if self.quantized else None,
            "merging": describe_merging(self.merging),
            "windows": list(self.windows),
            "units": [layer.held for layer in self.layers],
            "recall": self._report_recall(),
            "bytes": [layer.nbytes for layer in self.layers],
            "total_bytes": self.nbytes,
            "kv_bytes": sum(layer.units.kv_bytes for layer in self.layers),
            "full_cache_bytes": full,
            "ratio": self.nbytes / full if full else 0.0,
        }

    def _report_recall(self) -> dict[str, Any] | None:
        if self.recall is None:
            return None
        return dataclasses.asdict(self.recall) | {
            "host_units": max((host.units for host in self.hosts), default=0),
            "host_bytes": sum(host.host_bytes for host in self.hosts),
            "recalled_units": max((host.recalled for host in self.hosts), default=0),
        }


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


def _layer_schemes(
    windows: Sequence[int | None], scheme: Scheme
) -> Iterator[tuple[int | None, Scheme]]:
    """Each layer's window and scheme. Schemes count the layers that a budget bounds."""
    retained = 0
    for window in windows:
        yield window, scheme.for_layer(retained) if window is None else NO_SCHEME
        retained += window is None


_EVICTED = "evicted."
_IN_HOST_MEMORY = f"{_EVICTED}host."
"""How the names of evicted units begin among a layer's tensors."""

_RECORDED = ("model", "budget", "positions", "prompt_lengths", "query_length", "padding")

_FIELDS = (
    "budget",
    "eviction",
    "room",
    "prompt_lengths",
    "query_length",
    "token_ids",
    "unread_ids",
    "padding",
)
