"""The compressed cache of one request: a transformers `Cache` that holds a bounded set of units.

`get_seq_length()` is the number of tokens **seen**, so stock `generate()` slices its inputs
rightly; the number of units **held** is separate and stays within the budget while a prompt is
read. Everything a request needs to go on is here; nothing of it is kept on the model.

Positions (`Positions`):
  compact   units held fill the slots 0 .. S-1 in order, and keys are stored unrotated until
            decoding begins; as released. Any input length fits the backbone's window.
  original  keys are rotated once, at their source position; bounded by the backbone's window.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from locret.cache import files
from locret.cache.context import Counts
from locret.cache.host_blocks import HostBlocks
from locret.cache.layer import RetainedLayer
from locret.cache.merging import Merging, describe_merging
from locret.cache.recall import Recall
from locret.cache.store import Store
from locret.quantization import NO_SCHEME, Scheme, describe_scheme

Positions = Literal["compact", "original"]
Budgets = int | tuple[int, ...] | Counts | None
"""Units that a KV head keeps: one number for all, for each layer, or for each layer's heads."""

DECODE_ROOM = 256  # units of spare storage a growing layer takes, so that decoding appends in place


def check_storage(
    positions: Positions, scheme: Scheme, merging: Merging | None, recall: Recall | None
) -> None:
    """Refuse ways to hold units that do not go together (arguments: `RetainedCache`). ValueError:
    says which, and what to leave out."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions is {positions!r}; expected 'compact' or 'original'")
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


@dataclass(frozen=True)
class Snapshot:
    """What a cache was at some moment (`RetainedCache.snapshot`). It holds no copy of the units."""

    layers: tuple[SimpleNamespace, ...]
    fields: dict[str, Any]
    settings: dict[str, Any]


class RetainedCache(Cache):
    """The cache of one request.

    Args:
        num_layers: layers of the backbone.
        budget: units a KV head keeps while the prompt is read, or those of every layer, or of every
            layer's heads; None = all.
        positions: see the file's head.
        windows: the sliding window of each layer (`RetainedLayer`), None for those without; empty =
            no layer has one.
        scheme: how keys and values are stored, but for layers with a window: they hold theirs as
            they are.
        merging: how the values of evicted units are merged into others; None = they are lost.
        recall: what comes back of evicted units (`locret.cache.recall`); None = nothing. Does not
            go with merging.

    Attributes:
        current: what the forward that runs now does with the cache, a `Pass` of
            `locret.engine.attention`; None = it answers, or nothing runs.
        prompt_lengths: tokens of each row's first prompt (they decide LongRoPE's `by_length`
            rule); one for all rows if they agree.
        longrope: the LongRoPE rule that keys are rotated by; None where the backbone has none.
        query_length: tokens of the question that were read in front of the prompt (Locret-Q).
        answered: tokens were read without eviction while a budget holds, so that slots are fixed
            and units without a score are held.
        token_ids: [B, seen] long, on the CPU: the tokens read so far, evicted ones included; rows
            of a batch are padded on the left.
        unread_ids: [B, 0 or 1] long, on the CPU: the last token of the answer, which ends a call
            without being read; the next turn reads it first.
        padding: how many leading tokens of each row are padding; None = none.
        model: what the cache belongs to (`locret.cache.files.describe`), for `save`.
        restores: how often it was restored or emptied.
    """

    layers: list[RetainedLayer]  # type: ignore[assignment]

    def __init__(
        self,
        num_layers: int,
        budget: Budgets = None,
        positions: Positions = "compact",
        windows: Sequence[int | None] = (),
        scheme: Scheme = NO_SCHEME,
        merging: Merging | None = None,
        recall: Recall | None = None,
    ) -> None:
        check_storage(positions, scheme, merging, recall)
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
        self.current: Any = None
        self.restores = 0
        self._start_anew()

    def _start_anew(self) -> None:
        self.prompt_lengths: tuple[int, ...] = (0,)
        self.longrope: str | None = None
        self.query_length = 0
        self.answered = False
        self.token_ids: Tensor | None = None
        self.unread_ids = torch.empty(0, 0, dtype=torch.long)
        self.padding: tuple[int, ...] | None = None

    def shifted(self, token: int) -> tuple[int, ...]:
        """The position of token number `token` in each row, or one for all rows if they agree."""
        if self.padding is None:
            return (token,)
        return tuple(token - padding for padding in self.padding)

    def __bool__(self) -> bool:
        """False, so that stock Phi-3 keeps the cache; ask `cache is None` or `cache.seen` instead.

        Phi-3's generation code drops a true cache, to read everything again, when a sequence grows
        past LongRoPE's original window. Here the factors are fixed for a request: nothing has to be
        read again, and what was evicted could not be. No other stock code asks.
        """
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """How units are held: what rows of one batch have in common."""
        return {
            "positions": self.positions,
            "quantization": describe_scheme(self.scheme) if self.scheme.packs else None,
            "merging": describe_merging(self.merging),
            "recall": self.recall and dataclasses.asdict(self.recall),
        }

    @property
    def scored(self) -> bool:
        """Whether all units have scores, so that they can be evicted."""
        return all(layer.store.scored for layer in self.layers if not layer.is_empty)

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self.get_seq_length()

    @property
    def batch(self) -> int | None:
        """Rows; None = nothing was read, so that there may be any number."""
        if self.padding:
            return len(self.padding)
        filled = (layer.store for layer in self.layers if not layer.is_empty)
        return next((store.sequences.shape[0] for store in filled), None)

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
        self.restores += 1
        self._start_anew()

    def snapshot(self) -> Snapshot:
        """What the cache is now, to come back to with `restore`: ask a question, restore, ask the
        next one. Nothing is copied; the storage lives as long as the snapshot or the cache."""
        names = ("token_ids", "unread_ids", *files.REQUEST)
        fields = {name: copy.copy(getattr(self, name)) for name in names}
        return Snapshot(tuple(layer.view() for layer in self.layers), fields, self.settings)

    def restore(self, snapshot: Snapshot) -> None:
        """Be again what the cache was when `snapshot` was taken of it.

        Raises:
            ValueError: a snapshot of a cache with another number of layers, or of other settings.
        """
        if len(snapshot.layers) != len(self.layers):
            raise ValueError(
                f"the snapshot is of a cache of {len(snapshot.layers)} layers; this one has "
                f"{len(self.layers)}. Restore it where it was taken"
            )
        if snapshot.settings != self.settings:
            raise ValueError(
                f"the snapshot is of a cache of {snapshot.settings}; this one has {self.settings}. "
                "Restore it where it was taken"
            )
        for layer, view in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(view)
        for name, value in snapshot.fields.items():
            setattr(self, name, copy.copy(value))
        self.restores += 1

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """A block after which, if it raises, the cache is again what it was before: after an
        interrupt too, for a context may have taken minutes to read."""
        untouched = self.snapshot()
        try:
            yield
        except BaseException:
            self.restore(untouched)
            raise

    def fork(self) -> "RetainedCache":
        """A cache of its own that holds what this one does now. Nothing is copied: what is stored
        is never changed where it stands."""
        made = self._emptied()
        made.restore(self.snapshot())
        return made

    def save(self, path: str | Path) -> None:
        """Write the context to the folder `path`: safetensors and JSON (`locret.cache.files`).

        Raises:
            ValueError: nothing was read yet, the path is taken by something else, or a scheme of
                your own that `locret.quantization.SCHEMES` does not know stores the units.
        """
        files.save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "RetainedCache":
        """The context saved at `path`, to be used with `model`, which it was read with.

        Raises:
            ValueError: no context there, a damaged one, or one of another model; says which.
        """
        return files.load(cls, path, model)

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
    def stack(cls, rows: "Sequence[RetainedCache]", padded_to: int) -> "RetainedCache":
        """Caches of one row each as one batch. Empties `rows`.

        Args:
            rows: caches of the same settings, that of a padded row with its `padding`.
            padded_to: tokens of the longest row; shorter ones count as padded on the left.
        """
        first = rows[0]
        batch = first._emptied()
        batch.budget = max(rows, key=lambda row: row.shifted(row.seen)[0]).budget  # the longest's
        batch.longrope = first.longrope
        batch.query_length = max(row.query_length for row in rows)
        batch.answered = any(row.answered for row in rows)
        batch.prompt_lengths = tuple(row.prompt_lengths[0] for row in rows)
        batch.padding = tuple(padded_to - row.shifted(row.seen)[0] for row in rows)
        for layer, *of_rows in zip(batch.layers, *(row.layers for row in rows), strict=True):
            _take_rows(layer, of_rows)
            layer.seen = padded_to
        return batch

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after the other, for the beams of stock `generate`."""
        self._select_rows([row for row in range(self.batch or 1) for _ in range(repeats)])

    def rows(self, indices: Sequence[int]) -> "RetainedCache":
        """Some rows as a cache of their own; this one stays as it is."""
        chosen = self.fork()
        chosen._select_rows(indices)
        if self.token_ids is not None:
            chosen.token_ids = self.token_ids[list(indices)]
            chosen.unread_ids = self.unread_ids[list(indices)]
        return chosen

    def _select_rows(self, indices: Sequence[int]) -> None:
        """Let the layers hold only these rows of the batch, which may repeat."""
        filled = (layer.store.like.device for layer in self.layers if not layer.is_empty)
        device = next(filled, None)
        on_device = torch.tensor(indices, device=device)
        for layer in self.layers:
            layer.select_rows(on_device, indices)
        if self.padding is not None:
            self.padding = tuple(self.padding[i] for i in indices)
        if len(self.prompt_lengths) > 1:
            self.prompt_lengths = tuple(self.prompt_lengths[i] for i in indices)

    def report(self, heads: bool = False) -> dict[str, Any]:
        """What is held, in units and real bytes, against what a full cache would take.

        Args:
            heads: say of every head what it holds, too.

        Returns:
            `seen_tokens`, `budget`, `positions`, `quantization` (None or the scheme with its
            options), `merging` (likewise), per layer `windows` (None where the budget holds),
            `units` (held by a head on average), `most_units` and `least_units` (of the head and row
            that has most, or fewest) and `bytes` (storage of keys, values, their scales and
            outliers, scores, positions, weights, spare room), their sum `total_bytes`, `kv_bytes`
            (the part of it for keys and values), `full_cache_bytes` (keys and values of every token
            seen, or of a window) and `ratio` = total / full. `recall` is None, or its options with
            `host_units` (evicted), `host_bytes` and `recalled_units` (attended to beside `units` in
            the last step or chunk), all in the layer or head that has most but for the bytes, which
            are of all; what it takes of the device is part of `bytes`. With `heads`, also
            `head_units`, lists `[layer][row][head]`.
        """
        counts = [
            ((0,),) if layer.is_empty else layer.store.sequences.counts for layer in self.layers
        ]
        flat = [[n for row in layer for n in row] for layer in counts]
        full = sum(
            layer.store.full_bytes * min(layer.seen, layer.window or layer.seen)
            for layer in self.layers
        )
        report = {
            "seen_tokens": self.seen,
            "budget": self.budget,
            "positions": self.positions,
            "quantization": describe_scheme(self.scheme) if self.scheme.packs else None,
            "merging": describe_merging(self.merging),
            "windows": list(self.windows),
            "units": [_whole_if_so(sum(layer) / len(layer)) for layer in flat],
            "most_units": [*map(max, flat)],
            "least_units": [*map(min, flat)],
            "recall": self._report_recall(),
            "bytes": [layer.nbytes for layer in self.layers],
            "total_bytes": self.nbytes,
            "kv_bytes": sum(layer.store.kv_bytes for layer in self.layers),
            "full_cache_bytes": full,
            "ratio": self.nbytes / full if full else 0.0,
        }
        return report | ({"head_units": [[[*row] for row in x] for x in counts]} if heads else {})

    def _report_recall(self) -> dict[str, Any] | None:
        if self.recall is None:
            return None
        return dataclasses.asdict(self.recall) | {
            "host_units": max((host.units for host in self.hosts), default=0),
            "host_bytes": sum(host.host_bytes for host in self.hosts),
            "recalled_units": max((host.recalled for host in self.hosts), default=0),
        }


def _whole_if_so(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _layer_schemes(
    windows: Sequence[int | None], scheme: Scheme
) -> Iterator[tuple[int | None, Scheme]]:
    """Each layer's window and scheme. Schemes count the layers that a budget bounds."""
    retained = 0
    for window in windows:
        yield window, scheme.for_layer(retained) if window is None else NO_SCHEME
        retained += window is None


def _take_rows(layer: RetainedLayer, rows: Sequence[RetainedLayer]) -> None:
    """Let a new layer hold layers of one row each as one batch. Empties `rows`, so that one layer
    at a time is held twice."""
    layer.store = Store.of_rows([row.store for row in rows])
    # A row without a context has read nothing, and was never asked to rotate it.
    layer.rotated = next((row.rotated for row in rows if not row.is_empty), rows[0].rotated)
    layer.state = _stack_states([row.state for row in rows])
    if layer.host:
        layer.host = HostBlocks.stack([row.host for row in rows if row.host])
    for row in rows:
        row.store.clear()
        if row.host:
            row.host.clear()


def _stack_states(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What policies remember of rows, as one batch; zeros for rows that remember nothing."""
    some: dict[str, Tensor] = {}
    for row in rows:
        some = row | some
    return {
        name: torch.cat([row.get(name, torch.zeros_like(like)) for row in rows])
        for name, like in some.items()
    }
