"""The layer function of inference: attend over a bounded cache, then evict.

While a prompt is read: rotate at the slots, attend to the units held and to the new ones, rank
them, keep the best. A layer is compressed before the next one runs, so the peak is layers x budget
+ one chunk of one layer. After that slots do not move any more: keys are rotated once and new units
are appended in place.

Layers with a sliding window bound their cache by themselves: they hold the last units of a window,
whatever is read or answered, and no policy is asked.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from locret.cache.cache import DECODE_ROOM, Eviction, RetainedCache
from locret.cache.layer import RetainedLayer
from locret.cache.units import NewUnits, unscored
from locret.engine.evicting import Kept, evict, highest
from locret.model.attend import Backend, attend, attend_past
from locret.model.hooks import LayerCall, without_autocast
from locret.model.rotary import Rotary
from locret.policies.base import HeldUnits, LayerChunk, Policy
from locret.policies.selection import keep_counts, with_protected

Surprise = Callable[[Tensor, Tensor], Tensor]
"""Given hidden states [B, T, hidden size] and the tokens [B, T] that came next: -log p, [B, T]."""

BLOCK = 256  # tokens whose logits over the whole vocabulary are in memory at a time


class TakenIn(Exception):
    """Raised by the last layer when it has stored a chunk of a context: what would follow is the
    chunk's output, which nobody asks for."""


class RetainedAttention:
    """The layer function of inference, on a `RetainedCache`.

    While `cache.takes_in` is set, the last layer raises `TakenIn`.

    Args:
        policy: ranks units.
        backend: see `locret.model.attend`.
        surprise: the backbone's, for policies that wait.
    """

    def __init__(self, policy: Policy, backend: Backend, surprise: Surprise) -> None:
        self.policy = policy
        self.backend = backend
        self.surprise = surprise

    def __call__(self, call: LayerCall) -> Tensor:
        cache = call.cache
        if cache is None:
            raise ValueError(
                "the attached model runs without a cache; leave out use_cache=False, and turn "
                "gradient checkpointing off or call model.eval()"
            )
        layer: RetainedLayer = cache.layers[call.layer_idx]
        layer.place(call.key.device)
        own = call.value.dtype
        call = call.to(_dtype_of(layer, own, cache.eviction))
        leave = cache.takes_in and call.layer_idx == len(cache.layers) - 1
        if layer.window is None and cache.steps is None and cache.eviction is not None:
            output = self._read(call, layer, cache, cache.eviction, leave)
        else:
            with without_autocast(call.key.device):
                output = self._append(call, layer, cache, leave)
        layer.seen += call.key.shape[2] - (cache.eviction.drop if cache.eviction else 0)
        if output is None:
            raise TakenIn
        return output.to(own)

    def rotation(
        self, layer_idx: int, hidden: Tensor, cache: RetainedCache | None, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor] | None:
        """Tables with which the layer may rotate by itself: slots do not move any more, and nobody
        asks for queries and keys before RoPE. None: it must hand them over unrotated."""
        if cache is None or cache.eviction is not None or rotary is None:
            return None
        layer = cache.layers[layer_idx]
        if layer.window is not None or layer.stays_unrotated:
            return None
        if cache.steps is not None:
            return cache.steps.rotation(layer_idx)
        starts = _first_slots(layer, cache)
        return rotary.cos_sin(starts, hidden.shape[1], cache.prompt_lengths, hidden)

    def _append(
        self, call: LayerCall, layer: RetainedLayer, cache: RetainedCache, leave: bool
    ) -> Tensor | None:
        """No policy is asked."""
        if layer.window is not None:
            return self._slide(call, layer, layer.window, cache, leave)
        if cache.steps is not None:
            cache.answered = cache.budget is not None
            return cache.steps.attend(call, layer)
        return self._answer(call, layer, cache, leave)

    def _answer(
        self, call: LayerCall, layer: RetainedLayer, cache: RetainedCache, leave: bool
    ) -> Tensor | None:
        """Nothing is evicted any more."""
        cache.answered = cache.budget is not None
        layer.state = {}  # the policy does not see these tokens, so what it remembers goes stale
        lengths, starts = cache.prompt_lengths, _first_slots(layer, cache)
        layer.freeze(lambda keys: call.rotate(keys, layer.own_slots(0), lengths), cache.room)
        query, key = call.query, call.key
        if not call.rotated:
            query = call.rotate(query, starts, lengths)
            key = call.rotate(key, starts, lengths) if layer.rotated else key
        positions = torch.arange(layer.seen, layer.seen + key.shape[2], device=key.device)
        new = _without_padding(layer, key, call.value)
        layer.units.append(*new, unscored(key), positions, cache.room)
        output = None
        if not leave:
            keys, values, empty = _rotated_keys(call, layer, cache), layer.values, layer.empty
            scaling = call.scaling
            if layer.host is not None:
                keys, values, empty = layer.host.in_front(query, keys, values, empty)
            output = attend(query, keys, values, scaling, self.backend, empty, call.weighting)
        layer.units.settle()
        return output

    def _slide(
        self, call: LayerCall, layer: RetainedLayer, window: int, cache: RetainedCache, leave: bool
    ) -> Tensor | None:
        """Attend within the window, and hold no more than the next token sees of it."""
        lengths, held = cache.prompt_lengths, layer.held
        output, keep = None, max(window - 1, 1)
        if not leave:
            keys, values = call.key, call.value
            if held:
                keys = torch.cat([layer.keys, keys], dim=2)
                values = torch.cat([layer.values, values], dim=2)
            keys = call.rotate(keys, layer.own_slots(0), lengths)
            query = call.rotate(call.query, layer.own_slots(held), lengths)
            scaling, empty = call.scaling, layer.empty
            output = attend(query, keys, values, scaling, self.backend, empty, call.weighting)
        tokens = call.key.shape[2] - (cache.eviction.drop if cache.eviction else 0)
        positions = torch.arange(layer.seen, layer.seen + call.key.shape[2], device=call.key.device)
        new = NewUnits(call.key, call.value, unscored(call.key), positions).first(tokens)
        gone = max(held + tokens - keep, 0)
        if not gone:
            layer.units.append(*new)
            return output
        index = torch.arange(gone, held + tokens, device=call.key.device)
        layer.units.append_selected(new, index.expand(*call.key.shape[:2], -1))
        layer.note_evicted(gone)
        return output

    def _read(
        self,
        call: LayerCall,
        layer: RetainedLayer,
        cache: RetainedCache,
        eviction: Eviction,
        leave: bool,
    ) -> Tensor | None:
        """Attend, rank, and keep no more than the budget."""
        lengths, starts = cache.prompt_lengths, _first_slots(layer, cache)
        query, key = (call.rotate(x, starts, lengths) for x in (call.query, call.key))
        held = None
        if layer.held:
            keys = _rotated_keys(call, layer, cache)
            held = HeldUnits(keys, layer.values, layer.scores, layer.source_positions)
        past = (held.keys, held.values) if held else (key[:, :, :0], key[:, :, :0])
        new, output = (key, call.value), None
        if not leave:
            scaling, empty = call.scaling, layer.empty
            if layer.host is not None:
                *both, empty = layer.host.in_front(query, *past, empty)
                past = both[0], both[1]
            output = attend_past(query, past, new, scaling, self.backend, empty, call.weighting)
        scores = self._rank(call, layer, query, key, held, cache)
        if layer.host is not None:
            rotate = None if layer.rotated else functools.partial(_at_first_slot, call, cache)
            held_keys = held.keys if held else None
            layer.host.look(query, held_keys, key, rotate, at_once=self.policy.waits)
        with without_autocast(key.device):
            self._store(layer, call, key, scores, eviction)
        if layer.host is not None and not self.policy.waits:
            layer.host.forget_look()
        return output

    def _rank(
        self,
        call: LayerCall,
        layer: RetainedLayer,
        query: Tensor,
        key: Tensor,
        held: HeldUnits | None,
        cache: RetainedCache,
    ) -> Tensor:
        assert call.retained_idx is not None
        starts, lengths = _first_slots(layer, cache), cache.prompt_lengths

        def rotate(x: Tensor, offset: int) -> Tensor:
            return call.rotate(x, tuple(start + offset for start in starts), lengths)

        chunk = LayerChunk(
            layer_idx=call.retained_idx,
            query=call.query,
            key=call.key,
            value=call.value,
            hidden=call.hidden,
            start=layer.seen,
            scaling=call.scaling,
            rotated_query=query,
            rotated_key=key,
            held=held,
            state=layer.state,
            drop=cache.eviction.drop if cache.eviction else 0,
            empty=layer.empty,
            padding=torch.tensor(cache.padding, device=key.device) if cache.padding else None,
            rotate=rotate,
        )
        scores = self.policy.rank(chunk)
        expected = (*call.key.shape[:2], layer.held + call.key.shape[2])
        if tuple(scores.shape) != expected:
            raise ValueError(
                f"policy {type(self.policy).__name__} ranked {tuple(scores.shape)} units; expected "
                f"[batch, KV heads, held and new units], {expected}"
            )
        return scores.float()

    def _store(
        self,
        layer: RetainedLayer,
        call: LayerCall,
        rotated_key: Tensor,
        scores: Tensor,
        eviction: Eviction,
    ) -> None:
        held, tokens = layer.held, call.key.shape[2]
        assert call.retained_idx is not None and call.cache is not None
        positions = torch.arange(layer.seen, layer.seen + tokens, device=scores.device)
        if call.cache.padding is not None:  # each row counts its own tokens
            padding = torch.tensor(call.cache.padding, device=scores.device)
            positions = positions - padding[:, None, None]
        key = rotated_key if layer.rotated else call.key
        new = NewUnits(key, call.value, scores[:, :, held:], positions)
        if held:
            layer.units.replace_scores(scores[:, :, :held])
        if self.policy.waits:
            layer.units.append(*new)
            return
        if eviction.drop:
            tokens -= eviction.drop
            new = new.first(tokens)
            scores = scores[:, :, : held + tokens]
        most = max(eviction.budgets[call.retained_idx], layer.settled) + eviction.slack
        if held + tokens <= most:
            room = most - held - tokens if eviction.slack else 0
            layer.units.append(*new, room=min(room, DECODE_ROOM))
            layer.units.settle(tight=not eviction.slack)
            return
        (kept,) = self._choose([scores], [layer], [call.retained_idx], eviction)
        evict(layer, kept, eviction, new)

    def _choose(
        self,
        scores: list[Tensor],
        layers: list[RetainedLayer],
        layer_indices: list[int],
        eviction: Eviction,
    ) -> list[Kept]:
        """What layers with these scores [B, H, S] keep."""
        budgets = [eviction.budgets[i] for i in layer_indices]
        recent = [self.policy.recent(budget) - eviction.drop for budget in budgets]
        protected = [
            eviction.protected(i, last) for i, last in zip(layer_indices, recent, strict=True)
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
                    Kept(*keep_counts(s, count.minimum(most)))
                    for s, count, most in zip(known, counts, filled, strict=True)
                ]
        return [
            Kept(highest(s, budget, p, layer.empty), None)
            for s, budget, p, layer in zip(scores, budgets, protected, layers, strict=True)
        ]

    @property
    def _shares(self) -> bool:
        """Whether the policy has a say in how many units a head keeps."""
        return type(self.policy).allot is not Policy.allot

    def finish(self, cache: Any, input_ids: Tensor, hidden: Tensor) -> None:
        """After a chunk went through all layers: let a policy that waits evict.

        Args:
            cache: what the backbone was given.
            input_ids: [B, T]; hidden: [B, T, hidden size], the decoder's output.
        """
        if not self.policy.waits or not isinstance(cache, RetainedCache) or not cache.eviction:
            return
        eviction, layers = cache.eviction, cache.retained_layers
        surprisal = functools.partial(self._surprisal, cache, input_ids, hidden)
        ranked = self.policy.reconsider([layer.scores for layer in layers], surprisal)
        last = hidden[:, -1 - eviction.drop]
        layers[0].state["last_hidden"] = last.to(layers[0].scores.device, copy=True)
        with without_autocast(hidden.device):
            self._evict_ranked(layers, ranked, eviction)

    def _evict_ranked(
        self, layers: list[RetainedLayer], ranked: Sequence[Tensor], eviction: Eviction
    ) -> None:
        """Hold what a policy that waited ranks highest, by scores [B, H, S] of every layer."""
        for layer, scores in zip(layers, ranked, strict=True):
            layer.units.replace_scores(scores.float())
            if eviction.drop:
                left = torch.arange(layer.held - eviction.drop, device=scores.device)
                layer.units.select(left.expand(*scores.shape[:2], len(left)))
        full = [
            i
            for i, layer in enumerate(layers)
            if layer.held > max(eviction.budgets[i], layer.settled) + eviction.slack
        ]
        if full and self._shares:  # judged together, with the layers that are not full
            full = [*range(len(layers))]
        for i in set(range(len(layers))) - set(full):
            layers[i].units.settle(tight=not eviction.slack)
        if not full:
            return
        chosen = self._choose(
            [layers[i].scores for i in full], [layers[i] for i in full], full, eviction
        )
        for i, kept in zip(full, chosen, strict=True):
            evict(layers[i], kept, eviction)

    def _surprisal(self, cache: RetainedCache, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """-log p of every token given those before it, [B, T] float32; +inf where not known."""
        layer = cache.retained_layers[0]
        before = layer.state.get("last_hidden")
        first = hidden[:, :1] if before is None else before[:, None].to(hidden.device)
        predicting = torch.cat([first, hidden[:, :-1]], dim=1)
        surprisal = torch.cat(
            [
                self.surprise(part, ids)
                for part, ids in zip(
                    predicting.split(BLOCK, dim=1), input_ids.split(BLOCK, dim=1), strict=True
                )
            ],
            dim=1,
        )
        if before is None:
            surprisal[:, 0] = torch.inf
        if cache.padding is not None:
            tokens = input_ids.shape[1]
            column = torch.arange(layer.seen - tokens, layer.seen, device=hidden.device)
            own = column - torch.tensor(cache.padding, device=hidden.device)[:, None]
            surprisal = surprisal.masked_fill(own <= 0, torch.inf)
        return surprisal


def _without_padding(layer: RetainedLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """New keys and values [B, H, T, D], those of padding replaced by the row's first own ones if
    they will be packed: what stands there must not widen the range of its run."""
    if layer.empty is None or max(layer.shift) <= layer.held or not layer.quantized:
        return key, value
    new = torch.arange(key.shape[2], device=key.device)
    own = new.maximum((layer.empty - layer.held)[..., None]).clamp(max=key.shape[2] - 1)
    index = own[..., None].expand_as(key)
    return key.gather(2, index), value.gather(2, index)


def _dtype_of(layer: RetainedLayer, new: torch.dtype, eviction: Eviction | None) -> torch.dtype:
    """What a layer computes in: that of the units held, else of `new` ones. They differ where
    autocast was turned on or off between a context and its question."""
    held = layer.units.tail[0].dtype if layer.held else new
    if held != new and eviction is not None:
        raise ValueError(
            f"the cache holds {held} and the model now gives {new}: autocast was turned on or off "
            "since, and units of both are to be ranked; keep it as it was while units are evicted"
        )
    return held


def _first_slots(layer: RetainedLayer, cache: RetainedCache) -> tuple[int, ...]:
    """Where the first new token goes, in each row or in all of them."""
    if cache.positions == "original":
        return cache.shifted(layer.seen)
    return layer.own_slots(layer.held)


def _at_first_slot(call: LayerCall, cache: RetainedCache, keys: Tensor) -> Tensor:
    """Keys [B, H, any, D], all of them rotated at slot 0, where the oldest unit held is."""
    # No angle is left there: RoPE may only scale channels, by what it makes of ones.
    ones = keys.new_ones(keys.shape[0], 1, 1, keys.shape[3])
    return keys * call.rotate(ones, (0,), cache.prompt_lengths)


def _rotated_keys(call: LayerCall, layer: RetainedLayer, cache: RetainedCache) -> Tensor:
    """The keys held, rotated at their slots."""
    if layer.rotated:
        return layer.keys
    return call.rotate(layer.keys, layer.own_slots(0), cache.prompt_lengths)
