"""How chunks are read: rotate at the slots, attend to the units held and to the new ones, rank
them, keep the best (`ReadPass`). A layer is compressed before the next one runs, so the peak is
layers x budget + one chunk of one layer. Which units stay: `locret.engine.budgets`.

`ChunkForward` runs chunks through all layers: with fused kernels between the model's own matrix
products where `locret.model.prenorm` knows them, else by the model's own forward.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.cache.cache import DECODE_ROOM, RetainedCache
from locret.cache.context import sent
from locret.cache.layer import RetainedLayer
from locret.cache.store import NewTokens
from locret.engine.attention import (
    AnswerPass,
    Pass,
    RetainedAttention,
    chunk_of,
    next_slots,
    own_positions,
    pasts_of,
    recalled,
    rectangle_of,
)
from locret.engine.budgets import Choice, Scores
from locret.engine.rereading import FirstPass, SecondPass
from locret.model.attend import Past, attend_past
from locret.model.backbone import Backbone
from locret.model.backends import Backend, attend
from locret.model.hooks import (
    Enough,
    LayerCall,
    as_argument,
    as_output,
    autocasts,
    cache_in,
    without_autocast,
)
from locret.model.prenorm import Attend, PrenormDecoder, attend_by, why_not_fused
from locret.policies.base import Context, Eviction, LayerChunk, Policy
from locret.quantization.waiting import meanwhile, refusing_last

Surprise = Callable[[Tensor, Tensor], Tensor]
"""Given hidden states [B, T, hidden size] and the tokens [B, T] that came next: -log p, [B, T]."""

Rotate = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
"""Given [B, heads, S, D], the slot of each row's first token, and the prompts' lengths
(`Rotary.rotate`)."""

BLOCK = 256  # tokens whose logits over the whole vocabulary are in memory at a time


class ChunkCounts(NamedTuple):
    """How the chunks of a prompt were read.

    Attributes:
        read: all of them; in front of fast steps, what they leave of a prompt, or a question, too.
        fused: those with fused kernels between matrix products.
    """

    read: int = 0
    fused: int = 0


@dataclass
class ChunkForward:
    """Reads chunks through an attached backbone.

    Attributes:
        attention: the layer function that the backbone is attached with.
        policy: ranks units.
        counts: of the last call of the engine.
    """

    backbone: Backbone
    attention: RetainedAttention
    policy: Policy
    counts: ChunkCounts = ChunkCounts()
    _fused: PrenormDecoder | None = None
    _whole: bool = True
    """Every layer is let finish."""

    def begin(self) -> None:
        """Before a request: find out how its chunks run. Hooks and adapters come and go, so that
        requests differ."""
        fuses = not torch.is_grad_enabled() and why_not_fused(self.backbone) is None
        self._fused = PrenormDecoder(self.backbone) if fuses else None
        # Devices that share a model put layers back after use.
        self._whole = bool(getattr(self.backbone.model, "hf_device_map", None))
        self.counts = ChunkCounts()

    def store(
        self, chunk: Tensor, cache: RetainedCache, eviction: Eviction | None = None, more: int = 0
    ) -> None:
        """Run a chunk [B, n] through the layers, for what they store of it. Where all of it stays,
        storage is made for so many more tokens, too."""
        stores_only = not self._whole and not self.policy.waits
        self._run(chunk, cache, self.reading(eviction, stores_only, more))

    def reading(self, eviction: Eviction | None, stores_only: bool = False, more: int = 0) -> Pass:
        """The pass that reads a chunk; without an eviction, all of it stays, as it does until a
        policy that rereads has done so."""
        backend = self.attention.backend
        if eviction is None:
            return AnswerPass(backend, more + DECODE_ROOM, stores_only)
        if self.policy.rereads:
            return FirstPass(backend, eviction.drop, stores_only)
        return self._evicting(eviction, stores_only)

    def _evicting(self, eviction: Eviction, stores_only: bool = False) -> "ReadPass":
        surprise = self.backbone.surprise
        return ReadPass(self.policy, self.attention.backend, surprise, eviction, stores_only)

    def _run(self, ids: Tensor, cache: RetainedCache, current: Pass) -> None:
        """Let `current` read ids [B, T] through the layers, to the last one's output if that is
        wanted."""
        decoder = self.backbone.decoder
        with _refusing(cache), current.during(cache), contextlib.suppress(Enough):
            fused = self._counted()
            if fused is None:
                decoder(input_ids=ids, use_cache=True, **as_argument(decoder, cache))
            else:
                current.finish(cache, ids, fused.hidden(ids, self._attending(cache)))

    def reread(self, context: Tensor, cache: RetainedCache, eviction: Eviction) -> None:
        """Score a context [B, n] that the cache holds whole by reading it again, and evict."""
        policy, backend, ranked = self.policy, self.attention.backend, None
        if self._evicting(eviction).evicts(cache.retained_layers):
            scores: dict[int, Tensor] = {}
            for tokens, looking in policy.second_readings(context):
                count, stores_only = tokens.shape[1], not self._whole
                second = SecondPass(policy, backend, looking, scores, count, stores_only)
                self._run(tokens, cache, second)
            ranked = [scores[layer] for layer in sorted(scores)]
        self.evict(cache, eviction, ranked)

    def evict(
        self, cache: RetainedCache, eviction: Eviction, ranked: Sequence[Tensor] | None = None
    ) -> None:
        """Evict by the scores that units have, or by others of each layer, `ranked`, [B, H, S]."""
        layers = cache.retained_layers
        with without_autocast(self.backbone.layers[0].device):
            self._look_at_none(cache)
            ranked = ranked or [layer.store.rectangle("scores") for layer in layers]
            self._evicting(eviction).evict_ranked(layers, [*map(Scores.of, ranked, layers)])
        for host in cache.hosts:
            host.forget_look()

    def _look_at_none(self, cache: RetainedCache) -> None:
        """Before an eviction that no chunk is read for: let recall know that no query looked."""
        for at, layer in zip(self.backbone.layers, cache.layers, strict=True):
            if layer.host is None or layer.is_empty:
                continue
            layer.place(at.device)
            rotate = None
            if not layer.rotated and at.rotary is not None:
                lengths = cache.prompt_lengths
                rotate = functools.partial(_at_first_slot, at.rotary.rotate, lengths)
            layer.host.look_at_none(rotate)

    def outputs(self, run: Callable[..., Any], inputs: dict[str, Any], cache: RetainedCache) -> Any:
        """The model's outputs for `inputs`: what is left of a prompt, or a question."""
        ids: Any = inputs.get("input_ids")
        last = inputs.get("logits_to_keep", 0)
        takes = ids is not None and isinstance(last, int) and asks_logits(inputs, cache)
        fused = self._counted() if takes else None
        with _refusing(cache):  # it may freeze all layers, which packs their keys
            if fused is None:
                return without_mask(run, inputs)
            return as_output(fused.logits(ids, self._attending(cache), last), cache)

    def _counted(self) -> PrenormDecoder | None:
        """What reads one chunk more with fused kernels, if anything does."""
        fused = self._fused
        self.counts = ChunkCounts(self.counts.read + 1, self.counts.fused + (fused is not None))
        return fused

    def _attending(self, cache: RetainedCache) -> Attend:
        return attend_by(self.attention, self.backbone, cache)


def _refusing(cache: RetainedCache) -> contextlib.AbstractContextManager[None]:
    """What cannot be packed is refused once all layers have run, where a scheme packs."""
    packs = any(layer.store.scheme.packs for layer in cache.layers)
    return refusing_last() if packs else contextlib.nullcontext()


def asks_logits(inputs: dict[str, Any], cache: RetainedCache) -> bool:
    """Whether a call of the model is for this cache, and for nothing but logits."""
    asked = any(inputs.get(name) for name in ("output_hidden_states", "output_attentions"))
    return cache_in(inputs) is cache and not asked


def without_mask(run: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """A model's outputs for `inputs` whose `attention_mask` is stock `generate`'s to know: which
    slots of a row are empty, the cache knows."""
    return run(**inputs | {"attention_mask": None})


@dataclass(frozen=True)
class ReadPass(Pass):
    """Attend, let the policy rank, and keep no more than the eviction says; `surprise` is the
    backbone's, for policies that wait."""

    ranks = True

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
        output = None

        def attend_now() -> None:
            nonlocal output, pasts
            output, pasts = self._output(call, layer, chunk, pasts), []

        # To pack, the host waits for the device, which attends meanwhile. Else attention is first:
        # storing takes memory, and then what it has read of the context can go.
        packs = layer.store.scheme.packs and host is None and not autocasts(call.key.device)
        if wanted and not packs:
            attend_now()
        scores = self._ranked(chunk, layer)
        if host is not None:
            at_first = functools.partial(_at_first_slot, call.rotate, call.cache.prompt_lengths)
            rotate = None if layer.rotated else at_first
            before = chunk.context.keys if chunk.context else None
            query, key = chunk.rotated_query, chunk.rotated_key
            host.look(query, before, key, rotate, at_once=self.policy.waits)
        chunk = replace(chunk, context=None)
        attending: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if wanted and packs:
            attending = meanwhile(attend_now)
        else:
            pasts = []
        with without_autocast(call.key.device), attending:
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
            keys, values, empty = recalled(layer, query, pasts, chunk.empty)
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
        """Let a policy that waits evict."""
        if not self.policy.waits:
            return
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


def _at_first_slot(rotate: Rotate, lengths: Sequence[int], keys: Tensor) -> Tensor:
    """Keys [B, H, any, D] of prompts of such lengths, all of them rotated at slot 0, where the
    oldest unit held is."""
    # No angle is left there: RoPE may only scale channels, by what it makes of ones.
    ones = keys.new_ones(keys.shape[0], 1, 1, keys.shape[3])
    return keys * rotate(ones, (0,), lengths)
