"""The layer function of inference, and the passes that it runs: what a forward does with a cache.

A pass is chosen when a forward begins, and attends for one layer after the other:
  reading   (`ReadPass`) rotate at the slots, attend to the units held and to the new ones, rank
            them, keep the best. A layer is compressed before the next one runs, so the peak is
            layers x budget + one chunk of one layer.
  answering (`AnswerPass`) slots do not move any more: keys are rotated once, and new units are
            appended in place.
  stepping  (`locret.engine.steps`) the same for one token, with counters on the device.

Layers with a sliding window bound their cache by themselves, whatever the pass: they hold the last
units of a window, and no policy is asked.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.cache.cache import DECODE_ROOM, RetainedCache
from locret.cache.layer import RetainedLayer
from locret.cache.sequences import Counts, Sequences, alike, sequences_of
from locret.cache.store import NewTokens
from locret.kernels import select_sequences
from locret.model.attend import Backend, attend, attend_past
from locret.model.hooks import LayerCall, without_autocast
from locret.model.past import Past
from locret.model.rotary import Rotary
from locret.policies.base import Context, Eviction, LayerChunk, Policy, with_protected

Surprise = Callable[[Tensor, Tensor], Tensor]
"""Given hidden states [B, T, hidden size] and the tokens [B, T] that came next: -log p, [B, T]."""

BLOCK = 256  # tokens whose logits over the whole vocabulary are in memory at a time


class Scores(NamedTuple):
    """Scores float32 of a layer's units: [N] of the context, None = there is none; [B, H, n] of the
    tail and of new units."""

    context: Tensor | None
    rest: Tensor

    @classmethod
    def of(cls, scores: Tensor, layer: RetainedLayer) -> "Scores":
        """Those [B, H, S + n] of a rectangle (`Store.rectangle`), with n new units."""
        context = layer.store.context
        if context is None:
            return cls(None, scores)
        first = context.sequences.longest
        return cls(context.sequences.flattened(scores[:, :, :first]), scores[:, :, first:])

    def rectangle(self, whole: Sequences) -> Tensor:
        """[B, H, S + n], filled up in front."""
        if self.context is None:
            return self.rest
        before = whole.plus(-self.rest.shape[2])
        return torch.cat([before.rectangle(self.context), self.rest], dim=2)


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
    """Attend to the units held and to the new ones, all of which stay.

    Args:
        backend: see `locret.model.attend`.
        room: units expected to come, for which storage is made at once.
        stores_only: see `Pass`.
    """

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
        lengths, starts = cache.prompt_lengths, _next_slots(layer, cache)
        _freeze(call, layer, self.room)
        query, key = call.query, call.key
        if not call.rotated:
            query = call.rotate(query, starts, lengths)
            key = call.rotate(key, starts, lengths)
        positions = torch.arange(layer.seen, layer.seen + key.shape[2], device=key.device)
        store.append(NewTokens.of(key, call.value, _own(cache, positions)), self.room)
        output = self._output(call, layer, query) if wanted else None
        store.pack()
        return output

    def _output(self, call: LayerCall, layer: RetainedLayer, query: Tensor) -> Tensor:
        """Attention to all units held, of which the last are the queries' own."""
        pasts, new = _pasts(call, layer), query.shape[2]
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
        starts = _next_slots(cache.layers[layer_idx], cache)
        return rotary.cos_sin(starts, hidden.shape[1], cache.prompt_lengths, hidden)


@dataclass(frozen=True)
class ReadPass(Pass):
    """Attend, rank, and keep no more than the budget.

    Args:
        policy: ranks units.
        backend: see `locret.model.attend`.
        surprise: the backbone's, for policies that wait.
        eviction: what is kept.
        stores_only: see `Pass`.
    """

    policy: Policy
    backend: Backend
    surprise: Surprise
    eviction: Eviction
    stores_only: bool = False

    @property
    def drop(self) -> int:  # type: ignore[override]
        return self.eviction.drop

    def attend(self, call: LayerCall, layer: RetainedLayer, wanted: bool) -> Tensor | None:
        pasts, host = _pasts(call, layer), layer.host
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
        assert call.retained_idx is not None
        cache = call.cache
        starts, lengths = _next_slots(layer, cache), cache.prompt_lengths
        query, key = (call.rotate(x, starts, lengths) for x in (call.query, call.key))
        context, empty = None, None
        if pasts:
            sequences = layer.store.sequences
            empty = sequences.empty
            context = Context(sequences.longest, functools.partial(_rectangle, layer, pasts))

        def rotate(x: Tensor, offset: int) -> Tensor:
            return call.rotate(x, tuple(start + offset for start in starts), lengths)

        return LayerChunk(
            layer_idx=call.retained_idx,
            query=call.query,
            key=call.key,
            value=call.value,
            hidden=call.hidden,
            start=layer.seen,
            scaling=call.scaling,
            rotated_query=query,
            rotated_key=key,
            context=context,
            state=layer.state,
            drop=self.drop,
            empty=empty,
            padding=torch.tensor(cache.padding, device=key.device) if cache.padding else None,
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
        new = NewTokens.of(key, call.value, chunk.own_positions[:, None], own)
        store.replace_scores(scores.context, scores.rest[:, :, :before])
        if self.policy.waits:
            store.append(new)
            return
        if self.drop:
            new, rest = new.first(key.shape[2] - self.drop), scores.rest[:, :, : -self.drop]
            scores = scores._replace(rest=rest)
        left = self._left(layer, chunk.layer_idx, new.keys.shape[2])
        if left >= 0:
            store.append(new, room=min(left, DECODE_ROOM) if eviction.above else 0)
            store.pack(tight=not eviction.above)
            return
        ((index, kept),) = self._choose([scores], [layer], [chunk.layer_idx])
        layer.evict(index, kept, new, eviction.merging, eviction.query)

    def _left(self, layer: RetainedLayer, retained_idx: int, new: int) -> int:
        """How many more units a layer can hold after `new` ones came; below zero: it evicts."""
        counts, context = self.eviction.counts[retained_idx], layer.store.context
        spare = max(counts) if self._shares else min(counts)
        if context is not None:
            rows = zip(context.sequences.counts, context.appended, strict=True)
            spare = min(self._spare(counts, row, appended) for row, appended in rows)
        return spare + self.eviction.above - layer.store.tail.count - new

    def _spare(self, counts: Sequence[int], lengths: Sequence[int], appended: int) -> int:
        """How many more units a row can hold, of which `appended` came after its last eviction."""
        if self._shares:  # what one head has less, another has more
            return -appended
        # What is left may be more than is to be kept: a row was read with a budget of its own.
        left = min(c - n for c, n in zip(counts, lengths, strict=True)) + appended
        return max(left, 0) - appended

    def _choose(
        self, scores: Sequence[Scores], layers: Sequence[RetainedLayer], indices: Sequence[int]
    ) -> list[tuple[Tensor, Sequences]]:
        """What layers with these scores, the retained ones at `indices`, keep: which units of each
        sequence, ascending, and how many."""
        wholes = [_with_new(layer, each.rest) for layer, each in zip(layers, scores, strict=True)]
        counts = self._allotted(scores, layers, wholes, indices)
        chosen = []
        for each, whole, of_layer, i in zip(scores, wholes, counts, indices, strict=True):
            kept = sequences_of(
                tuple(
                    tuple(map(min, of_row, has))
                    for of_row, has in zip(of_layer, whole.counts, strict=True)
                ),
                whole.device,
            )
            protected = self.eviction.protected(i, self.policy) * whole.shape[0]
            # A head that shares what it has may keep fewer than the eviction protects.
            firsts = [min(head, n) for (_, head), n in zip(protected, kept.flat, strict=True)]
            lasts = [
                min(tail, n - head)
                for (tail, _), head, n in zip(protected, firsts, kept.flat, strict=True)
            ]
            chosen.append((_highest(each, whole, kept, lasts, firsts), kept))
        return chosen

    def _allotted(
        self,
        scores: Sequence[Scores],
        layers: Sequence[RetainedLayer],
        wholes: Sequence[Sequences],
        indices: Sequence[int],
    ) -> list[Counts]:
        """How many units each row and head may keep."""
        static = [
            (self.eviction.counts[i],) * whole.shape[0]
            for i, whole in zip(indices, wholes, strict=True)
        ]
        if not self._shares:
            return static
        known = []
        for each, whole, i in zip(scores, wholes, indices, strict=True):
            tail, head = self.eviction.protected(i, self.policy)[0]
            known.append(with_protected(each.rectangle(whole), tail, head, whole.empty))
        allotted = self.policy.allot(known, [self.eviction.budget(i) for i in indices])
        if allotted is None:
            return static
        return [tuple(map(tuple, counts.tolist())) for counts in allotted]

    @property
    def _shares(self) -> bool:
        """Whether the policy has a say in how many units a head keeps."""
        return type(self.policy).allot is not Policy.allot

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
            self._evict_ranked(layers, scores)

    def _evict_ranked(self, layers: Sequence[RetainedLayer], ranked: list[Scores]) -> None:
        """Hold what a policy that waited ranks highest."""
        eviction = self.eviction
        for i, (layer, scores) in enumerate(zip(layers, ranked, strict=True)):
            layer.store.replace_scores(*scores)
            layer.store.drop_last(self.drop)
            if self.drop:
                ranked[i] = scores._replace(rest=scores.rest[:, :, : -self.drop])
        full = [i for i, layer in enumerate(layers) if self._left(layer, i, 0) < 0]
        if full and self._shares:  # judged together, with the layers that are not full
            full = [*range(len(layers))]
        for i in set(range(len(layers))) - set(full):
            layers[i].store.pack(tight=not eviction.above)
        if not full:
            return
        some = [layers[i] for i in full]
        chosen = self._choose([ranked[i] for i in full], some, full)
        for layer, (index, kept) in zip(some, chosen, strict=True):
            layer.evict(index, kept, None, eviction.merging, eviction.query)

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
            own = tokens - torch.tensor(cache.padding, device=hidden.device)[:, None]
            surprisal = surprisal.masked_fill(own <= 0, torch.inf)
        return surprisal


class RetainedAttention:
    """The layer function of inference: runs the pass that a request's cache is in.

    Args:
        policy: ranks units.
        backend: see `locret.model.attend`.
        surprise: the backbone's, for policies that wait.
    """

    def __init__(self, policy: Policy, backend: Backend, surprise: Surprise) -> None:
        self.policy = policy
        self.backend = backend
        self.surprise = surprise
        self._default = AnswerPass(backend)

    def reading(self, eviction: Eviction | None, stores_only: bool = False) -> Pass:
        """The pass that reads a chunk; without an eviction, all of it stays."""
        if eviction is None:
            return AnswerPass(self.backend, stores_only=stores_only)
        return ReadPass(self.policy, self.backend, self.surprise, eviction, stores_only)

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
        call = call.to(_dtype_of(layer, own, isinstance(current, ReadPass)))
        if layer.window is None:
            output = current.attend(call, layer, wanted)
        else:
            with without_autocast(call.key.device):
                output = _slide(call, layer, layer.window, self.backend, current.drop, wanted)
        layer.seen += call.key.shape[2] - current.drop
        if output is None:
            raise Stored
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
        """After a chunk went through all layers of the backbone, which was given `cache`."""
        current = cache.current if isinstance(cache, RetainedCache) else None
        if isinstance(current, ReadPass) and self.policy.waits:
            current.finish(cache, input_ids, hidden)


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
    positions = torch.arange(layer.seen, layer.seen + new, device=call.key.device)
    added = NewTokens.of(call.key, call.value, _own(call.cache, positions)).first(new - drop)
    more = added.keys.shape[2]
    whole = (
        alike(call.key.shape[0], (more,) * call.key.shape[1], call.key.device)
        if layer.is_empty
        else store.sequences.plus(more)
    )
    keep = max(window - 1, 1)
    if whole.longest <= keep:
        store.append(added)
        return output
    kept = sequences_of(tuple(tuple(min(n, keep) for n in r) for r in whole.counts), whole.device)
    gone = (whole.lengths - kept.lengths).flatten()
    layer.evict(kept.local + gone[kept.owner], kept, added)
    return output


def _with_new(layer: RetainedLayer, rest: Tensor) -> Sequences:
    """The sequences of a layer's context and of the units [B, H, n] that follow."""
    context = layer.store.context
    if context is None:
        return alike(rest.shape[0], (rest.shape[2],) * rest.shape[1], rest.device)
    return context.sequences.plus(rest.shape[2])


def _own(cache: RetainedCache, positions: Tensor) -> Tensor:
    """Positions [T] counted from each row's own first token, [1 or B, 1, T]."""
    if cache.padding is None:
        return positions[None, None]
    return (positions - torch.tensor(cache.padding, device=positions.device)[:, None])[:, None]


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


def _next_slots(layer: RetainedLayer, cache: RetainedCache) -> tuple[int, ...]:
    """Where the first new token goes, in each row or in all of them."""
    return cache.shifted(layer.seen) if cache.positions == "original" else layer.next_slots()


def _at_first_slot(call: LayerCall, keys: Tensor) -> Tensor:
    """Keys [B, H, any, D], all of them rotated at slot 0, where the oldest unit held is."""
    # No angle is left there: RoPE may only scale channels, by what it makes of ones.
    ones = keys.new_ones(keys.shape[0], 1, 1, keys.shape[3])
    return keys * call.rotate(ones, (0,), call.cache.prompt_lengths)


def _freeze(call: LayerCall, layer: RetainedLayer, room: int) -> None:
    """From here on slots do not move: rotate the keys once, where they stand."""
    if layer.rotated:
        return
    lengths, store = call.cache.prompt_lengths, layer.store
    context = store.context
    store.freeze(
        lambda keys: call.rotate_context(keys, context.sequences, lengths) if context else keys,
        lambda keys: call.rotate(keys, layer.first_tail_slots(), lengths),
        room,
    )
    layer.rotated = True


def _pasts(call: LayerCall, layer: RetainedLayer) -> list[Past]:
    """Context and tail of a layer, keys rotated."""
    store, lengths, pasts = layer.store, call.cache.prompt_lengths, []
    if store.context is not None:
        sequences = store.context.sequences
        keys = store.context.all_keys()
        if not layer.rotated:
            keys = call.rotate_context(keys, sequences, lengths)
        pasts.append(Past(keys, store.context.all_values(), sequences))
    if store.tail.count:
        keys = store.tail[0]
        if not layer.rotated:
            keys = call.rotate(keys, layer.first_tail_slots(), lengths)
        pasts.append(Past(keys, store.tail[1]))
    return pasts


def _rectangle(layer: RetainedLayer, pasts: Sequence[Past], name: str) -> Tensor:
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
    keys, values = (_rectangle(layer, pasts, name) for name in ("keys", "values"))
    return layer.host.in_front(query, keys, values, empty)


def _highest(
    scores: Scores, whole: Sequences, kept: Sequences, lasts: Sequence[int], firsts: Sequence[int]
) -> Tensor:
    """Which units of each sequence have the highest scores, long [K], ascending.

    Args:
        whole: all units; kept: how many stay.
        lasts, firsts: of each sequence, units that stay whatever they scored.
    """
    rest, device = scores.rest, whole.device
    before = whole.plus(-rest.shape[2])
    context = rest.new_empty(0) if scores.context is None else scores.context
    stay, last, first = (_numbers(tuple(x), device) for x in (kept.flat, lasts, firsts))
    return select_sequences(
        context,
        rest,
        before.offsets,
        stay,
        kept.offsets,
        last,
        first,
        total=kept.total,
        longest=whole.longest,
    )


@functools.lru_cache(maxsize=1024)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 on the device; what is asked for again is not copied again."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)
