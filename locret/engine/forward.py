"""How a chunk goes through all layers: with fused kernels between the model's own matrix products
where `locret.model.prenorm` knows them, else by the model's own forward; and a model whose calls go
through a function of ours, while the model itself is left as it is."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.engine.attention import RetainedAttention
from locret.model.backbone import Backbone
from locret.model.hooks import as_argument, as_output, cache_in
from locret.model.prenorm import Attend, PrenormDecoder, PrenormLayer, why_not_fused


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
        counts: of the last call of the engine.
    """

    backbone: Backbone
    attention: RetainedAttention
    counts: ChunkCounts = ChunkCounts()

    def __call__(self, ids: Tensor, cache: RetainedCache) -> None:
        """Read ids [B, T] into a cache, in its current pass.

        Raises:
            Stored: the last layer was done, and no caller wants its output.
        """
        fused, decoder = self._begin(), self.backbone.decoder
        if fused is None:
            decoder(input_ids=ids, use_cache=True, **as_argument(decoder, cache))
        else:
            self.attention.finish(cache, ids, fused.hidden(ids, self._attending(cache)))

    def outputs(self, run: Callable[..., Any], inputs: dict[str, Any], cache: RetainedCache) -> Any:
        """The model's outputs for `inputs`: what is left of a prompt, or a question."""
        ids: Any = inputs.get("input_ids")
        last = inputs.get("logits_to_keep", 0)
        takes = ids is not None and isinstance(last, int) and asks_logits(inputs, cache)
        fused = self._begin() if takes else None
        if fused is None:
            return without_mask(run, inputs)
        return as_output(fused.logits(ids, self._attending(cache), last), cache)

    def _begin(self) -> PrenormDecoder | None:
        """Count a chunk, and get what reads it with fused kernels, if anything may do so now: hooks
        and adapters come and go, so this is found out for every chunk."""
        fuses = not torch.is_grad_enabled() and why_not_fused(self.backbone) is None
        self.counts = ChunkCounts(self.counts.read + 1, self.counts.fused + fuses)
        return PrenormDecoder(self.backbone) if fuses else None

    def _attending(self, cache: RetainedCache) -> Attend:
        """What stores and attends for one layer after the other."""

        def attend(i: int, x: Tensor, layer: PrenormLayer) -> Tensor:
            call = self.backbone.layers[i].call(x, layer.heads(x), layer.scaling, cache)
            return self.attention(call)

        return attend


def asks_logits(inputs: dict[str, Any], cache: RetainedCache) -> bool:
    """Whether a call of the model is for this cache, and for nothing but logits."""
    asked = any(inputs.get(name) for name in ("output_hidden_states", "output_attentions"))
    return cache_in(inputs) is cache and not asked


def without_mask(run: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """A model's outputs for `inputs` whose `attention_mask` is stock `generate`'s to know: which
    slots of a row are empty, the cache knows."""
    return run(**inputs | {"attention_mask": None})


def seen_through(model: Any, through: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> Any:
    """`model`, whose calls go through `through(run, inputs)` first. The model itself is left as it
    is: what is returned is another object of a subclass, with the same attributes."""
    kind: Any = type(model)
    seen: Any = object.__new__(_seen_class(kind))
    object.__setattr__(seen, "__dict__", model.__dict__)
    object.__setattr__(seen, "_through", through)  # a slot of its own, not the model's attribute
    return seen


@functools.cache
def _seen_class(kind: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(kind.__call__, self)
        return run(*args, **kwargs) if args else self._through(run, kwargs)

    body = {"__call__": call, "__slots__": ("_through",), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)
