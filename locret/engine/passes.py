"""Passes: what a forward does with a cache. One is chosen when it begins, and attends for one layer
after the other:

  reading   (`ReadPass`) rotate at the slots, attend to the units held and to the new ones, rank
            them, keep the best. A layer is compressed before the next one runs, so the peak is
            layers x budget + one chunk of one layer.
  answering (`AnswerPass`) slots do not move any more: keys are rotated once, and new units are
            appended in place.
  stepping  (`locret.engine.steps`) the same for one token, with counters on the device.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from locret.cache.cache import DECODE_ROOM, RetainedCache
from locret.cache.layer import RetainedLayer
from locret.cache.sequences import sent
from locret.cache.tail import NewTokens
from locret.engine.choosing import Choice, Scores
from locret.model.attend import Past, attend_past
from locret.model.backends import Backend, attend
from locret.model.hooks import LayerCall, without_autocast
from locret.model.rotary import Rotary
from locret.policies.base import Context, Eviction, LayerChunk, Policy

Surprise = Callable[[Tensor, Tensor], Tensor]
"""Given hidden states [B, T, hidden size] and the tokens [B, T] that came next: -log p, [B, T]."""

BLOCK = 256  # tokens whose logits over the whole vocabulary are in memory at a time


class Stored(Exception):
    """Raised by the last layer when it has stored a chunk of a context: what would follow is the
    chunk's output, which nobody asks for."""


class Pass:
    """What a forward does with the cache of its request, one layer after the other.

    Attributes:
        drop: last tokens that are given up again.
        stores_only: nobody asks for the output, so that the last layer need not attend.
    """

    drop: int = 0
    stores_only: bool = False

    def attend(self, call: LayerCall, layer: RetainedLayer, wanted: bool) -> Tensor | None:
        """Store the new units of a layer without a window, and the attention output [B, T, H*G, D]
        if it is wanted."""
        raise NotImplementedError

    def rotation(
        self, layer_idx: int, hidden: Tensor, cache: RetainedCache, rotary: Rotary
    ) -> tuple[Tensor, Tensor] | None:
        """Tables with which a layer may rotate by itself: slots do not move any more, and nobody
        asks for queries and keys before RoPE. None: it must hand them over unrotated."""
        return None


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
            keys, values, empty = _recalled(layer, query, pasts, layer.store.sequences.empty)
            return attend(query, keys, values, call.scaling, self.backend, empty, call.weighting)
        if new == 1:
            return attend_past(query, pasts, None, *how)
        tail = pasts.pop()
        before = Past(tail.keys[:, :, :-new], tail.values[:, :, :-new])
        own = tail.keys[:, :, -new:], tail.values[:, :, -new:]
        return attend_past(query, [*pasts, before], own, *how)

    def rotation(
        self, layer_idx: int, hidden: Tensor, cache: RetainedCache, rotary: Rotary
    ) -> tuple[Tensor, Tensor] | None:
        starts = next_slots(cache.layers[layer_idx], cache)
        return rotary.cos_sin(starts, hidden.shape[1], cache.prompt_lengths, hidden)


@dataclass(frozen=True)
class ReadPass(Pass):
    """Attend, let the policy rank, and keep no more than the eviction says; `surprise` is the
    backbone's, for policies that wait."""

    policy: Policy
    backend: Backend
    surprise: Surprise
    eviction: Eviction
    stores_only: bool = False

    @property
    def drop(self) -> int:  # type: ignore[override]
        return self.eviction.drop

    @property
    def _choice(self) -> Choice:
        return Choice(self.policy, self.eviction)

    def attend(self, call: LayerCall, layer: RetainedLayer, wanted: bool) -> Tensor | None:
        pasts, host = pasts_of(call, layer), layer.host
        chunk = self._chunk(call, layer, pasts)
        output = self._output(call, layer, chunk, pasts) if wanted else None
        scores = self._ranked(chunk, layer)
        if host is not None:
            rotate = None if layer.rotated else functools.partial(_at_first_slot, call)
            before = chunk.context.keys if chunk.context else None
            query, key = chunk.rotated_query, chunk.rotated_key
            host.look(query, before, key, rotate, at_once=self.policy.waits)
        # Rotated keys of the context are not needed any more, and storing takes memory of its own.
        del pasts
        chunk = replace(chunk, context=None)
        with without_autocast(call.key.device):
            self._store(call, layer, chunk, scores)
        if host is not None and not self.policy.waits:
            host.forget_look()
        return output

    def _chunk(self, call: LayerCall, layer: RetainedLayer, pasts: Sequence[Past]) -> LayerChunk:
        """What the policy sees of the call."""
        cache = call.cache
        starts, lengths = next_slots(layer, cache), cache.prompt_lengths
        query, key = (call.rotate(x, starts, lengths) for x in (call.query, call.key))
        context, empty = None, None
        if pasts:
            sequences = layer.store.sequences
            empty = sequences.empty
            context = Context(sequences.longest, functools.partial(rectangle_of, layer, pasts))

        def rotate(x: Tensor, offset: int) -> Tensor:
            return call.rotate(x, tuple(start + offset for start in starts), lengths)

        return chunk_of(
            call,
            query,
            key,
            start=layer.seen,
            context=context,
            state=layer.state,
            drop=self.drop,
            empty=empty,
            padding=sent(cache.padding, key.device) if cache.padding else None,
            rotate=rotate,
        )

    def _output(
        self, call: LayerCall, layer: RetainedLayer, chunk: LayerChunk, pasts: Sequence[Past]
    ) -> Tensor:
        query, new = chunk.rotated_query, (chunk.rotated_key, chunk.value)
        empty = None
        if layer.host is not None and pasts:
            keys, values, empty = _recalled(layer, query, pasts, chunk.empty)
            if empty is not None:
                keys, values = (torch.cat(x, dim=2) for x in zip((keys, values), new, strict=True))
                how = call.scaling, self.backend, empty, call.weighting
                return attend(query, keys, values, *how)
            pasts = [Past(keys, values)]
        return attend_past(query, pasts, new, call.scaling, self.backend, call.weighting)

    def _ranked(self, chunk: LayerChunk, layer: RetainedLayer) -> Scores:
        """Scores of the units held and of new ones."""
        policy, store = self.policy, layer.store
        if not policy.ranks_anew:
            new, of_tail = policy.score_new(chunk), [*store.tail][3:4]
            context = None if store.context is None else store.context.exact["scores"]
            return Scores(context, torch.cat([*of_tail, new], dim=2) if of_tail else new)
        scores = policy.rank(chunk)
        expected = (*chunk.key.shape[:2], chunk.context_length + chunk.key.shape[2])
        if tuple(scores.shape) != expected:
            raise ValueError(
                f"policy {type(policy).__name__} ranked {tuple(scores.shape)} units; expected "
                f"[batch, KV heads, held and new units], {expected}"
            )
        return Scores.of(scores.float(), layer)

    def _store(
        self, call: LayerCall, layer: RetainedLayer, chunk: LayerChunk, scores: Scores
    ) -> None:
        """Hold the chunk's units and those held before, but for the lowest scores."""
        before, eviction, store = layer.store.tail.count, self.eviction, layer.store
        key = chunk.rotated_key if layer.rotated else call.key
        own = scores.rest[:, :, before:]
        new = NewTokens.of(key, call.value, own_positions(call, layer), own)
        store.replace_scores(scores.context, scores.rest[:, :, :before])
        if self.policy.waits:
            store.append(new)
            return
        if self.drop:
            new, rest = new.first(key.shape[2] - self.drop), scores.rest[:, :, : -self.drop]
            scores = scores._replace(rest=rest)
        left = self._choice.left(layer, chunk.layer_idx, new.keys.shape[2])
        if left >= 0:
            store.append(new, room=min(left, DECODE_ROOM) if eviction.above else 0)
            store.pack(tight=not eviction.above)
            return
        ((index, kept),) = self._choice.choose([scores], [layer], [chunk.layer_idx])
        layer.evict(index, kept, new, eviction.merging, eviction.query)

    def finish(self, cache: RetainedCache, input_ids: Tensor, hidden: Tensor) -> None:
        """Let a policy that waits evict, after a chunk went through all layers.

        Args:
            input_ids: [B, T]; hidden: [B, T, hidden size], the decoder's output.
        """
        layers = cache.retained_layers
        surprisal = functools.partial(self._surprisal, cache, input_ids, hidden)
        ranked = self.policy.reconsider(
            [layer.store.rectangle("scores") for layer in layers], surprisal
        )
        last = hidden[:, -1 - self.drop]
        device = layers[0].store.like.device
        layers[0].state["last_hidden"] = last.to(device, copy=True)
        with without_autocast(hidden.device):
            scores = [Scores.of(x.float(), layer) for x, layer in zip(ranked, layers, strict=True)]
            self.evict_ranked(layers, scores)

    def evict_ranked(self, layers: Sequence[RetainedLayer], ranked: list[Scores]) -> None:
        """Hold what a policy that waited, or reread, ranks highest."""
        eviction = self.eviction
        for i, (layer, scores) in enumerate(zip(layers, ranked, strict=True)):
            layer.store.replace_scores(*scores)
            layer.store.drop_last(self.drop)
            if self.drop:
                ranked[i] = scores._replace(rest=scores.rest[:, :, : -self.drop])
        full = self._full(layers)
        if full and self.policy.shares:  # judged together, with the layers that are not full
            full = [*range(len(layers))]
        for i in set(range(len(layers))) - set(full):
            layers[i].store.pack(tight=not eviction.above)
        if not full:
            return
        some = [layers[i] for i in full]
        chosen = self._choice.choose([ranked[i] for i in full], some, full)
        for layer, (index, kept) in zip(some, chosen, strict=True):
            layer.evict(index, kept, None, eviction.merging, eviction.query)

    def evicts(self, layers: Sequence[RetainedLayer]) -> bool:
        """Whether `evict_ranked` gives up any of their units."""
        return bool(self._full(layers))

    def _full(self, layers: Sequence[RetainedLayer]) -> list[int]:
        """Those layers that hold more than they keep."""
        return [i for i, layer in enumerate(layers) if self._choice.left(layer, i, 0) < 0]

    def _surprisal(self, cache: RetainedCache, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """-log p of every token given those before it, [B, T] float32; +inf where not known."""
        layer = cache.retained_layers[0]
        before = layer.state.get("last_hidden")
        first = hidden[:, :1] if before is None else before[:, None].to(hidden.device)
        predicting = torch.cat([first, hidden[:, :-1]], dim=1).split(BLOCK, dim=1)
        following = input_ids.split(BLOCK, dim=1)
        surprisal = torch.cat([*map(self.surprise, predicting, following)], dim=1)
        if before is None:
            surprisal[:, 0] = torch.inf
        if cache.padding is not None:
            tokens = torch.arange(layer.seen - input_ids.shape[1], layer.seen, device=hidden.device)
            own = tokens - sent(cache.padding, hidden.device)[:, None]
            surprisal = surprisal.masked_fill(own <= 0, torch.inf)
        return surprisal


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


def _at_first_slot(call: LayerCall, keys: Tensor) -> Tensor:
    """Keys [B, H, any, D], all of them rotated at slot 0, where the oldest unit held is."""
    # No angle is left there: RoPE may only scale channels, by what it makes of ones.
    ones = keys.new_ones(keys.shape[0], 1, 1, keys.shape[3])
    return keys * call.rotate(ones, (0,), call.cache.prompt_lengths)


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
    if store.context is not None:
        sequences = store.context.sequences
        keys = store.context.all_keys()
        if not layer.rotated:
            keys = call.rotate_context(keys, sequences, lengths)
        merging = call.cache.merging
        folds = merging is not None and merging.fold
        bias = store.context.exact["weights"].log() if folds else None
        pasts.append(Past(keys, store.context.all_values(), sequences, bias))
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


def _recalled(
    layer: RetainedLayer, query: Tensor, pasts: Sequence[Past], empty: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`HostBlocks.in_front` of what a layer holds."""
    assert layer.host is not None
    keys, values = (rectangle_of(layer, pasts, name) for name in ("keys", "values"))
    return layer.host.in_front(query, keys, values, empty)
