"""The layer function of inference: runs the pass that a request's cache is in.

Layers with a sliding window bound their cache by themselves, whatever the pass: they hold the last
units of a window, and no policy is asked.
"""

from typing import Any

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.cache.layer import RetainedLayer
from locret.cache.sequences import alike, sequences_of
from locret.cache.tail import NewTokens
from locret.engine.passes import AnswerPass, Pass, ReadPass, Stored, Surprise, own_positions
from locret.engine.rereading import FirstPass
from locret.model.backends import Backend, attend
from locret.model.hooks import LayerCall, without_autocast
from locret.model.rotary import Rotary
from locret.policies.base import Eviction, Policy


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
        """The pass that reads a chunk; without an eviction, all of it stays, as it does until a
        policy that rereads has done so."""
        if eviction is None:
            return AnswerPass(self.backend, stores_only=stores_only)
        if self.policy.rereads:
            return FirstPass(self.backend, eviction.drop, stores_only)
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
    own = own_positions(call, layer)
    added = NewTokens.of(call.key, call.value, own).first(new - drop)
    batch, heads, more = added.scores.shape
    none = alike(batch, (0,) * heads, call.key.device)
    whole = (none if layer.is_empty else store.sequences).plus(more)
    keep = max(window - 1, 1)
    if whole.longest <= keep:
        store.append(added)
        return output
    kept = sequences_of(tuple(tuple(min(n, keep) for n in r) for r in whole.counts), whole.device)
    gone = (whole.lengths - kept.lengths).flatten()
    layer.evict(kept.local + gone[kept.owner], kept, added)
    return output


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
