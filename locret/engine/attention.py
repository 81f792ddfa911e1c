"""What a layer does with new tokens: the layer function of inference, which runs the pass that a
request's cache is in. A pass is chosen when a forward begins, and attends for one layer after the
other:

  answering (`AnswerPass`) slots do not move any more: keys are rotated once, and new units are
            appended in place.
  reading   (`locret.engine.reading`) keep the best units.
  stepping  (`locret.engine.steps`) answer one token, with counters on the device.

Layers with a sliding window bound their cache by themselves, whatever the pass: they hold the last
units of a window, and no policy is asked.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from locret.cache.cache import DECODE_ROOM, RetainedCache
from locret.cache.context import alike, sent, sequences_of
from locret.cache.layer import RetainedLayer
from locret.cache.store import NewTokens
from locret.model.attend import Past, attend_past
from locret.model.backends import Backend, attend, multiplies_fast
from locret.model.hooks import Enough, LayerCall, without_autocast
from locret.model.rotary import Rotary
from locret.policies.base import LayerChunk


class RetainedAttention:
    """The layer function of inference: runs the pass that a request's cache is in.

    Args:
        backend: see `locret.model.backends`.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._default = AnswerPass(backend)

    def __call__(self, call: LayerCall) -> Tensor:
        cache = call.cache
        if cache is None:
            raise ValueError(
                "the attached model runs without a cache; leave out use_cache=False, and turn "
                "gradient checkpointing off or call model.eval()"
            )
        layer: RetainedLayer = cache.layers[call.layer_idx]
        layer.place(call.key.device)
        current: Pass = cache.current or self._default
        wanted = not (current.stores_only and call.layer_idx == len(cache.layers) - 1)
        own = call.value.dtype
        call = call.to(_dtype_of(layer, own, current.ranks))
        if layer.window is None:
            output = current.attend(call, layer, wanted)
        else:
            with without_autocast(call.key.device):
                output = current.slide(call, layer, layer.window, self.backend, wanted)
        layer.seen += call.key.shape[2] - current.drop
        if output is None:
            raise Enough
        return output.to(own)

    def rotation(
        self, layer_idx: int, hidden: Tensor, cache: RetainedCache | None, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor] | None:
        """Tables with which the layer may rotate by itself, or None (`Pass.rotation`)."""
        if cache is None or rotary is None:
            return None
        layer, current = cache.layers[layer_idx], cache.current or self._default
        if layer.window is not None:
            return None
        return current.rotation(layer_idx, hidden, cache, rotary)

    def finish(self, cache: Any, input_ids: Tensor, hidden: Tensor) -> None:
        """`Pass.finish`, after layers that were given `cache`."""
        if isinstance(cache, RetainedCache) and cache.current is not None:
            cache.current.finish(cache, input_ids, hidden)


class Pass:
    """What a forward does with the cache of its request, one layer after the other.

    Attributes:
        drop: last tokens that are given up again.
        stores_only: nobody asks for the output, so that the last layer need not attend.
    """

    drop: int = 0
    stores_only: bool = False
    ranks: ClassVar[bool] = False
    """Units held are compared with new ones."""

    @contextlib.contextmanager
    def during(self, cache: RetainedCache) -> Iterator[None]:
        """Let forwards with the cache do this with it, until the block ends."""
        before, cache.current = cache.current, self
        try:
            yield
        finally:
            cache.current = before

    def attend(self, call: LayerCall, layer: RetainedLayer, wanted: bool) -> Tensor | None:
        """Store the new units of a layer without a window, and the attention output [B, T, H*G, D]
        if it is wanted."""
        raise NotImplementedError

    def slide(
        self, call: LayerCall, layer: RetainedLayer, window: int, backend: Backend, wanted: bool
    ) -> Tensor | None:
        """The same of a layer with a window."""
        return _slide(call, layer, window, backend, self.drop, wanted)

    def rotation(
        self, layer_idx: int, hidden: Tensor, cache: RetainedCache, rotary: Rotary
    ) -> tuple[Tensor, Tensor] | None:
        """Tables with which a layer may rotate by itself: slots do not move any more, and nobody
        asks for queries and keys before RoPE. None: it must hand them over unrotated."""
        return None

    def finish(self, cache: RetainedCache, input_ids: Tensor, hidden: Tensor) -> None:
        """After the tokens [B, T] went through all layers: [B, T, hidden size], the decoder's
        output."""


@dataclass(frozen=True)
class AnswerPass(Pass):
    """Attend to the units held and to the new ones, all of which stay; `room` units are expected to
    come, for which storage is made at once."""

    backend: Backend
    room: int = DECODE_ROOM
    stores_only: bool = False

    def attend(self, call: LayerCall, layer: RetainedLayer, wanted: bool) -> Tensor | None:
        with without_autocast(call.key.device):
            return self._attend(call, layer, wanted)

    def _attend(self, call: LayerCall, layer: RetainedLayer, wanted: bool) -> Tensor | None:
        cache, store = call.cache, layer.store
        cache.answered = cache.budget is not None
        layer.state = {}  # the policy does not see these tokens, so what it remembers goes stale
        lengths, starts = cache.prompt_lengths, next_slots(layer, cache)
        freeze(layer, call.rotary, lengths, self.room)
        query, key = call.query, call.key
        if not call.rotated:
            query = call.rotate(query, starts, lengths)
            key = call.rotate(key, starts, lengths)
        store.append(NewTokens.of(key, call.value, own_positions(call, layer)), self.room)
        output = self._output(call, layer, query) if wanted else None
        store.pack()
        return output

    def _output(self, call: LayerCall, layer: RetainedLayer, query: Tensor) -> Tensor:
        """Attention to all units held, of which the last are the queries' own."""
        pasts, new = pasts_of(call, layer), query.shape[2]
        how = call.scaling, self.backend, call.weighting
        if layer.host is not None:
            keys, values, empty = recalled(layer, query, pasts, layer.store.sequences.empty)
            return attend(query, keys, values, call.scaling, self.backend, empty, call.weighting)
        if new == 1:
            return attend_past(query, pasts, None, *how)
        tail = pasts.pop()
        if not pasts and multiplies_fast(query):  # which reads them where they are
            return attend(query, tail.keys, tail.values, *how[:2], None, call.weighting)
        before = Past(tail.keys[:, :, :-new], tail.values[:, :, :-new])
        own = tail.keys[:, :, -new:], tail.values[:, :, -new:]
        return attend_past(query, [*pasts, before], own, *how)

    def rotation(
        self, layer_idx: int, hidden: Tensor, cache: RetainedCache, rotary: Rotary
    ) -> tuple[Tensor, Tensor] | None:
        starts = next_slots(cache.layers[layer_idx], cache)
        return rotary.cos_sin(starts, hidden.shape[1], cache.prompt_lengths, hidden)


def _slide(
    call: LayerCall, layer: RetainedLayer, window: int, backend: Backend, drop: int, wanted: bool
) -> Tensor | None:
    """Attend within the window, and hold no more than the next token sees of it."""
    store, lengths, new = layer.store, call.cache.prompt_lengths, call.key.shape[2]
    rows = (0,) if layer.is_empty else store.sequences.longest_of_rows
    output = None
    if wanted:
        keys, values, empty = call.key, call.value, None
        if not layer.is_empty:
            keys = torch.cat([layer.keys, keys], dim=2)
            values = torch.cat([layer.values, values], dim=2)
            empty = store.sequences.empty
        keys = call.rotate(keys, tuple(n - layer.longest for n in rows), lengths)
        query = call.rotate(call.query, rows, lengths)
        output = attend(query, keys, values, call.scaling, backend, empty, call.weighting)
    own = own_positions(call, layer)
    keep_window(layer, window, NewTokens.of(call.key, call.value, own).first(new - drop))
    return output


def keep_window(layer: RetainedLayer, window: int, new: NewTokens) -> None:
    """Hold no more units, of those held and `new` ones, than the next token sees of a window."""
    batch, heads, more = new.scores.shape
    none = alike(batch, (0,) * heads, new.keys.device)
    whole = (none if layer.is_empty else layer.store.sequences).plus(more)
    keep = max(window - 1, 1)
    if whole.longest > keep:
        counts = tuple(tuple(min(n, keep) for n in row) for row in whole.counts)
        kept = sequences_of(counts, whole.device)
        gone = (whole.lengths - kept.lengths).flatten()
        layer.evict(kept.local + gone[kept.owner], kept, new)
    else:
        layer.store.append(new)


def _dtype_of(layer: RetainedLayer, new: torch.dtype, ranks: bool) -> torch.dtype:
    """What a layer computes in: that of the units held, else of `new` ones. They differ where
    autocast was turned on or off between a context and its question."""
    stored = new if layer.is_empty else layer.store.like.dtype
    if stored != new and ranks:
        raise ValueError(
            f"the cache holds {stored} and the model now gives {new}: autocast was turned on or "
            "off since, and units of both are to be ranked; keep it as it was while units are "
            "evicted"
        )
    return stored


def chunk_of(call: LayerCall, query: Tensor, key: Tensor, **more: Any) -> LayerChunk:
    """What a policy sees of a call whose queries and keys are rotated to these; `more` fields."""
    assert call.retained_idx is not None
    return LayerChunk(
        layer_idx=call.retained_idx,
        query=call.query,
        key=call.key,
        value=call.value,
        hidden=call.hidden,
        scaling=call.scaling,
        rotated_query=query,
        rotated_key=key,
        **more,
    )


def own_positions(call: LayerCall, layer: RetainedLayer) -> Tensor:
    """Positions of the new tokens counted from each row's own first one, [1 or B, 1, T] int32."""
    device = call.key.device
    positions = _range(layer.seen, layer.seen + call.key.shape[2], device)
    if call.cache.padding is None:
        return positions[None, None]
    return (positions - sent(call.cache.padding, device, torch.int32)[:, None])[:, None]


@functools.lru_cache(maxsize=4)
def _range(start: int, end: int, device: torch.device) -> Tensor:
    """int32; the same for all layers of a chunk."""
    return torch.arange(start, end, dtype=torch.int32, device=device)


def next_slots(layer: RetainedLayer, cache: RetainedCache) -> tuple[int, ...]:
    """Where the first new token goes, in each row or in all of them."""
    return cache.shifted(layer.seen) if cache.positions == "original" else layer.next_slots()


def freeze(
    layer: RetainedLayer, rotary: Rotary | None, lengths: Sequence[int], room: int = DECODE_ROOM
) -> None:
    """From here on slots do not move: rotate the keys once, where they stand.

    Args:
        rotary: the layer's rotation; None for a layer without RoPE.
        lengths: tokens of each row's prompt.
        room: units expected to come, for which storage is made at once.
    """
    if layer.rotated:
        return
    store, context = layer.store, layer.store.context

    def of_context(keys: Tensor) -> Tensor:
        if rotary is None or context is None:
            return keys
        return rotary.rotate_sequences(keys, context.sequences, lengths)

    def of_tail(keys: Tensor) -> Tensor:
        return keys if rotary is None else rotary.rotate(keys, layer.first_tail_slots(), lengths)

    store.freeze(of_context, of_tail, room)
    layer.rotated = True


def pasts_of(call: LayerCall, layer: RetainedLayer) -> list[Past]:
    """Context and tail of a layer, keys rotated. Units count for what was folded into them."""
    store, lengths, pasts = layer.store, call.cache.prompt_lengths, []
    context, merging = store.context, call.cache.merging
    folds = merging is not None and merging.fold
    if context is not None and layer.rotated and not folds and context.packed_keys is None:
        pasts.append(Past(*context.plainly))
    elif context is not None:
        keys = context.all_keys()
        if not layer.rotated:
            keys = call.rotate_context(keys, context.sequences, lengths)
        bias = context.exact["weights"].log() if folds else None
        pasts.append(Past(keys, context.all_values(), context.sequences, bias))
    if store.tail.count:
        keys = store.tail[0]
        if not layer.rotated:
            keys = call.rotate(keys, layer.first_tail_slots(), lengths)
        pasts.append(Past(keys, store.tail[1]))
    return pasts


def rectangle_of(layer: RetainedLayer, pasts: Sequence[Past], name: str) -> Tensor:
    """What a layer holds as a rectangle (`Store.rectangle`), keys and values from `pasts`."""
    if name not in ("keys", "values"):
        return layer.store.rectangle(name)
    each = [
        getattr(past, name)
        if past.sequences is None
        else past.sequences.rectangle(getattr(past, name))
        for past in pasts
    ]
    return each[0] if len(each) == 1 else torch.cat(each, dim=2)


def recalled(
    layer: RetainedLayer, query: Tensor, pasts: Sequence[Past], empty: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`HostBlocks.in_front` of what a layer holds."""
    assert layer.host is not None
    keys, values = (rectangle_of(layer, pasts, name) for name in ("keys", "values"))
    return layer.host.in_front(query, keys, values, empty)
