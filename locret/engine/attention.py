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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locret.cache.cache import DECODE_ROOM, RetainedCache
from locret.cache.layer import NewTokens, RetainedLayer
from locret.model.attend import Backend, attend, attend_past
from locret.model.hooks import LayerCall, without_autocast
from locret.model.rotary import Rotary
from locret.policies.base import (
    Context,
    Eviction,
    Kept,
    LayerChunk,
    Policy,
    keep_counts,
    keep_highest,
    with_protected,
)

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
        cache = call.cache
        cache.answered = cache.budget is not None
        layer.state = {}  # the policy does not see these tokens, so what it remembers goes stale
        lengths, starts = cache.prompt_lengths, _first_slots(layer, cache)
        layer.freeze(lambda keys: call.rotate(keys, layer.own_slots(0), lengths), self.room)
        query, key = call.query, call.key
        if not call.rotated:
            query = call.rotate(query, starts, lengths)
            key = call.rotate(key, starts, lengths) if layer.rotated else key
        positions = torch.arange(layer.seen, layer.seen + key.shape[2], device=key.device)
        new = NewTokens.of(*_without_padding(layer, key, call.value), positions)
        layer.units.append(new, self.room)
        output = None
        if wanted:
            keys, values, empty = _rotated_keys(call, layer), layer.values, layer.empty
            if layer.host is not None:
                keys, values, empty = layer.host.in_front(query, keys, values, empty)
            output = attend(query, keys, values, call.scaling, self.backend, empty, call.weighting)
        layer.units.pack()
        return output

    def rotation(
        self, layer_idx: int, hidden: Tensor, cache: RetainedCache, rotary: Rotary
    ) -> tuple[Tensor, Tensor] | None:
        starts = _first_slots(cache.layers[layer_idx], cache)
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
        chunk, host = self._chunk(call, layer), layer.host
        output = self._output(call, layer, chunk) if wanted else None
        scores = self._ranked(chunk)
        if host is not None:
            rotate = None if layer.rotated else functools.partial(_at_first_slot, call)
            before = chunk.context.keys if chunk.context else None
            query, key = chunk.rotated_query, chunk.rotated_key
            host.look(query, before, key, rotate, at_once=self.policy.waits)
        with without_autocast(call.key.device):
            self._store(call, layer, chunk, scores)
        if host is not None and not self.policy.waits:
            host.forget_look()
        return output

    def _chunk(self, call: LayerCall, layer: RetainedLayer) -> LayerChunk:
        """What the policy sees of the call."""
        assert call.retained_idx is not None
        cache = call.cache
        starts, lengths = _first_slots(layer, cache), cache.prompt_lengths
        query, key = (call.rotate(x, starts, lengths) for x in (call.query, call.key))
        context = None
        if layer.slots:
            keys = _rotated_keys(call, layer)
            context = Context(keys, layer.values, layer.scores, layer.source_positions)

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
            empty=layer.empty,
            padding=torch.tensor(cache.padding, device=key.device) if cache.padding else None,
            rotate=rotate,
        )

    def _output(self, call: LayerCall, layer: RetainedLayer, chunk: LayerChunk) -> Tensor:
        query, new, context = chunk.rotated_query, (chunk.rotated_key, chunk.value), chunk.context
        past = (context.keys, context.values) if context else (new[0][:, :, :0], new[1][:, :, :0])
        empty = layer.empty
        if layer.host is not None:
            *both, empty = layer.host.in_front(query, *past, empty)
            past = both[0], both[1]
        return attend_past(query, past, new, call.scaling, self.backend, empty, call.weighting)

    def _ranked(self, chunk: LayerChunk) -> Tensor:
        """Scores [B, H, S + T] float32 of held and new units."""
        scores = self.policy.rank(chunk)
        expected = (*chunk.key.shape[:2], chunk.context_length + chunk.key.shape[2])
        if tuple(scores.shape) != expected:
            raise ValueError(
                f"policy {type(self.policy).__name__} ranked {tuple(scores.shape)} units; expected "
                f"[batch, KV heads, held and new units], {expected}"
            )
        return scores.float()

    def _store(
        self, call: LayerCall, layer: RetainedLayer, chunk: LayerChunk, scores: Tensor
    ) -> None:
        """Hold the chunk's units and those held before, but for the lowest scores."""
        before, eviction = chunk.context_length, self.eviction
        key = chunk.rotated_key if layer.rotated else call.key
        new = NewTokens.of(key, call.value, chunk.own_positions[:, None], scores[:, :, before:])
        if before:
            layer.units.replace_scores(scores[:, :, :before])
        if self.policy.waits:
            layer.units.append(new)
            return
        if self.drop:
            new, scores = new.first(key.shape[2] - self.drop), scores[:, :, : -self.drop]
        left = eviction.most(chunk.layer_idx, layer.after_eviction) - scores.shape[2]
        if left >= 0:
            layer.units.append(new, room=min(left, DECODE_ROOM) if eviction.above else 0)
            layer.units.pack(tight=not eviction.above)
            return
        (kept,) = self._choose([scores], [layer], [chunk.layer_idx])
        layer.evict(*kept, new, eviction.merging, eviction.query)

    def _choose(
        self, scores: Sequence[Tensor], layers: Sequence[RetainedLayer], indices: Sequence[int]
    ) -> list[Kept]:
        """What layers with these scores [B, H, S], the retained ones at `indices`, keep."""
        eviction = self.eviction
        budgets = [eviction.budgets[i] for i in indices]
        protected = [
            eviction.protected(i, self.policy.recent(budget))
            for i, budget in zip(indices, budgets, strict=True)
        ]
        if self._shares:
            known = [
                with_protected(s, *p, layer.empty)
                for s, p, layer in zip(scores, protected, layers, strict=True)
            ]
            counts = self.policy.allot(known, budgets)
            if counts is not None:
                filled = [(s > -torch.inf).sum(dim=-1) for s in known]
                return [
                    keep_counts(s, count.minimum(most))
                    for s, count, most in zip(known, counts, filled, strict=True)
                ]
        return [
            Kept(keep_highest(s, budget, *p, layer.empty), None)
            for s, budget, p, layer in zip(scores, budgets, protected, layers, strict=True)
        ]

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
        ranked = self.policy.reconsider([layer.scores for layer in layers], surprisal)
        last = hidden[:, -1 - self.drop]
        layers[0].state["last_hidden"] = last.to(layers[0].scores.device, copy=True)
        with without_autocast(hidden.device):
            self._evict_ranked(layers, ranked)

    def _evict_ranked(self, layers: Sequence[RetainedLayer], ranked: Sequence[Tensor]) -> None:
        """Hold what a policy that waited ranks highest, by scores [B, H, S] of every layer."""
        eviction = self.eviction
        for layer, scores in zip(layers, ranked, strict=True):
            layer.units.replace_scores(scores.float())
            if self.drop:
                left = torch.arange(layer.slots - self.drop, device=scores.device)
                layer.units.select(left.expand(*scores.shape[:2], len(left)))
        most = [eviction.most(i, layer.after_eviction) for i, layer in enumerate(layers)]
        full = [i for i, layer in enumerate(layers) if layer.slots > most[i]]
        if full and self._shares:  # judged together, with the layers that are not full
            full = [*range(len(layers))]
        for i in set(range(len(layers))) - set(full):
            layers[i].units.pack(tight=not eviction.above)
        if not full:
            return
        chosen = self._choose([layers[i].scores for i in full], [layers[i] for i in full], full)
        for i, kept in zip(full, chosen, strict=True):
            layers[i].evict(*kept, None, eviction.merging, eviction.query)

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
        if layer.window is not None or layer.stays_unrotated:
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
    lengths, before = call.cache.prompt_lengths, layer.slots
    output, keep = None, max(window - 1, 1)
    if wanted:
        keys, values = call.key, call.value
        if before:
            keys = torch.cat([layer.keys, keys], dim=2)
            values = torch.cat([layer.values, values], dim=2)
        keys = call.rotate(keys, layer.own_slots(0), lengths)
        query = call.rotate(call.query, layer.own_slots(before), lengths)
        output = attend(query, keys, values, call.scaling, backend, layer.empty, call.weighting)
    tokens = call.key.shape[2] - drop
    positions = torch.arange(layer.seen, layer.seen + call.key.shape[2], device=call.key.device)
    new = NewTokens.of(call.key, call.value, positions).first(tokens)
    gone = max(before + tokens - keep, 0)
    if not gone:
        layer.units.append(new)
        return output
    index = torch.arange(gone, before + tokens, device=call.key.device)
    layer.units.append_selected(new, index.expand(*call.key.shape[:2], -1))
    layer.note_evicted(gone)
    return output


def _without_padding(layer: RetainedLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """New keys and values [B, H, T, D], those of padding replaced by the row's first own ones if
    they will be packed: what stands there must not widen the range of its block."""
    if layer.empty is None or max(layer.shift) <= layer.slots or not layer.quantized:
        return key, value
    new = torch.arange(key.shape[2], device=key.device)
    own = new.maximum((layer.empty - layer.slots)[..., None]).clamp(max=key.shape[2] - 1)
    index = own[..., None].expand_as(key)
    return key.gather(2, index), value.gather(2, index)


def _dtype_of(layer: RetainedLayer, new: torch.dtype, ranks: bool) -> torch.dtype:
    """What a layer computes in: that of the units held, else of `new` ones. They differ where
    autocast was turned on or off between a context and its question."""
    stored = layer.units.tail[0].dtype if layer.slots else new
    if stored != new and ranks:
        raise ValueError(
            f"the cache holds {stored} and the model now gives {new}: autocast was turned on or "
            "off since, and units of both are to be ranked; keep it as it was while units are "
            "evicted"
        )
    return stored


def _first_slots(layer: RetainedLayer, cache: RetainedCache) -> tuple[int, ...]:
    """Where the first new token goes, in each row or in all of them."""
    if cache.positions == "original":
        return cache.shifted(layer.seen)
    return layer.own_slots(layer.slots)


def _at_first_slot(call: LayerCall, keys: Tensor) -> Tensor:
    """Keys [B, H, any, D], all of them rotated at slot 0, where the oldest unit held is."""
    # No angle is left there: RoPE may only scale channels, by what it makes of ones.
    ones = keys.new_ones(keys.shape[0], 1, 1, keys.shape[3])
    return keys * call.rotate(ones, (0,), call.cache.prompt_lengths)


def _rotated_keys(call: LayerCall, layer: RetainedLayer) -> Tensor:
    """The keys held, rotated at their slots."""
    if layer.rotated:
        return layer.keys
    return call.rotate(layer.keys, layer.own_slots(0), call.cache.prompt_lengths)
