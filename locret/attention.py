"""What happens inside an attention layer while an engine is attached.

Score the new units, put them beside those held, rotate at the slots, attend, evict at once: a layer
is compressed before the next one runs, so the peak is layers x budget + one chunk of one layer.

B batch, H KV heads, G query heads a KV head, T new tokens, S slots, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from locret.cache import DECODE_ROOM, RetainedCache, RetainedLayer
from locret.policies.base import LayerChunk, Policy
from locret.rotary import Rotary
from locret.selection import keep_highest
from locret.units import unscored

IMPLEMENTATION = "locret"
"""The name under which transformers knows our attention function."""

Backend = Literal["eager", "sdpa"]


@dataclass(frozen=True)
class LayerCall:
    """One attention layer's call, as the backbone made it.

    Attributes:
        layer_idx: the layer.
        query: [B, H*G, T, D]; key, value: [B, H, T, D]; all before RoPE.
        hidden: [B, T, hidden size], the layer's input.
        scaling: softmax scale.
        rotary: the backbone's rotation; None for a layer without RoPE.
        cache: what the backbone was given as `past_key_values`.
        output: the layer's output projection, if it has one by the usual name.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    scaling: float
    rotary: Rotary | None
    cache: Any
    output: Any

    def rotate_packed(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """`x` with sequences of these lengths one after the other, each rotated from slot 0 on."""
        return x if self.rotary is None else self.rotary.rotate_packed(x, lengths)

    @property
    def output_weight(self) -> Tensor | None:
        """[hidden size, H*G * D]; None where it is stored in fewer bits, or in parts."""
        if hasattr(self.output, "base_layer"):  # an adapter adds to the weight that it wraps
            return None
        weight = getattr(self.output, "weight", None)
        return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None

    def part(self, start: int, end: int) -> "LayerCall":
        """The same call, for some of its tokens."""
        heads = {name: getattr(self, name)[:, :, start:end] for name in ("query", "key", "value")}
        return replace(self, **heads, hidden=self.hidden[:, start:end])

    def rotate(self, x: Tensor, start: int, prompt_length: int) -> Tensor:
        """`x` [B, heads, S, D] at the slots from `start` on; unchanged in a layer without RoPE."""
        return x if self.rotary is None else self.rotary.rotate(x, start, prompt_length)


LayerFunction = Callable[[LayerCall], Tensor]
"""Computes a layer's attention output [B, T, H*G, D] from its call."""


def register() -> None:
    """Make our attention function known to transformers. Harmless to repeat."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    retained: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that stock attention layers call; `retained` is what the attachment handed in.

    The arguments stand in the order of transformers' own attention functions, because kvpress,
    which wraps them all, passes the first six by position.

    Raises:
        ValueError: the layer is not one that an engine is attached to, or a mask was made.
    """
    if retained is None:
        raise ValueError(
            f"attention implementation {IMPLEMENTATION!r} works only through locret.Engine; "
            "load the model with 'sdpa' or 'eager'"
        )
    if attention_mask is not None:
        raise ValueError("locret attends causally and takes no 4D attention mask")
    return retained(query, key, value, scaling), None


def no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Nothing is materialised: the attention function is causal by itself.

    Raises:
        ValueError: `attention_mask` [B, seen + T] holds zeros.
    """
    if attention_mask is None or torch.compiler.is_compiling():
        return
    if not attention_mask.all():
        raise ValueError("attention_mask holds zeros: padding is not supported by locret")


class RetainedAttention:
    """The layer function of inference, on a `RetainedCache`.

    Args:
        policy: scores new units.
        backend: `eager` or `sdpa`.
    """

    def __init__(self, policy: Policy, backend: Backend) -> None:
        self.policy = policy
        self.backend = backend

    def __call__(self, call: LayerCall) -> Tensor:
        cache = call.cache
        if cache is None:
            raise ValueError(
                "the attached model runs without a cache; leave out use_cache=False, and turn "
                "gradient checkpointing off or call model.eval()"
            )
        layer: RetainedLayer = cache.layers[call.layer_idx]
        new = call.key.shape[2]
        start = layer.seen if cache.positions == "original" else layer.held
        if cache.eviction is None:
            _freeze(layer, call, cache)
        query = call.rotate(call.query, start, cache.prompt_length)
        self._append(layer, call, cache, start)
        keys = layer.keys
        if not layer.rotated:
            keys = call.rotate(keys, 0, cache.prompt_length)
        output = attend(query, keys, layer.values, call.scaling, self.backend)
        layer.seen += new
        if cache.eviction is not None and layer.held > cache.eviction.budget:
            plan = cache.eviction
            kept = keep_highest(layer.scores, plan.budget, plan.stabilizers, plan.query)
            layer.units.select(kept)
        return output

    def _append(
        self, layer: RetainedLayer, call: LayerCall, cache: RetainedCache, start: int
    ) -> None:
        scores, room = unscored(call.key), DECODE_ROOM
        if cache.eviction is not None:
            scores, room = self.policy.score(_chunk(call, layer.seen)), 0
            if scores.shape != call.key.shape[:3]:
                raise ValueError(
                    f"policy {type(self.policy).__name__} returned scores of shape "
                    f"{tuple(scores.shape)}; expected [batch, KV heads, new tokens], "
                    f"{tuple(call.key.shape[:3])}"
                )
        key = call.key
        if layer.rotated:
            key = call.rotate(key, start, cache.prompt_length)
        positions = torch.arange(layer.seen, layer.seen + key.shape[2], device=key.device)
        layer.units.append(key, call.value, scores, positions, room)


def _chunk(call: LayerCall, start: int) -> LayerChunk:
    return LayerChunk(
        layer_idx=call.layer_idx,
        query=call.query,
        key=call.key,
        value=call.value,
        hidden=call.hidden,
        start=start,
        scaling=call.scaling,
    )


def _freeze(layer: RetainedLayer, call: LayerCall, cache: RetainedCache) -> None:
    """From here on slots do not move: rotate the keys once, where they stand."""
    if layer.rotated:
        return
    if layer.held:
        layer.units.replace_keys(call.rotate(layer.keys, 0, cache.prompt_length))
    layer.rotated = True


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, backend: Backend) -> Tensor:
    """Causal attention of the last T of S slots.

    Query t sees the slots 0 .. S - T + t (lower-right causal).

    Args:
        query: [B, H*G, T, D], rotated. key, value: [B, H, S, D], S >= T, rotated.
        scaling: softmax scale.
        backend: `sdpa` is fast; `eager` is the plain twin, which takes T x S memory a head.

    Returns:
        [B, T, H*G, D].
    """
    if backend == "eager":
        output = _attend_eager(query, key, value, scaling)
    else:
        output = _attend_sdpa(query, key, value, scaling)
    return output.transpose(1, 2).contiguous()


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    new, slots = query.shape[2], key.shape[2]
    # SDPA's own is_causal is aligned upper-left, which is right only for a square.
    square = new == slots and new > 1
    mask = None if square or new == 1 else causal_lower_right(new, slots)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=square, scale=scaling, enable_gqa=True
    )


def _attend_eager(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    batch, heads, slots, size = key.shape
    new = query.shape[2]
    grouped = query.reshape(batch, heads, -1, new, size)
    logits = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)) * scaling
    future = torch.ones(new, slots, dtype=torch.bool, device=key.device).triu(slots - new + 1)
    weights = logits.masked_fill(future, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    output = torch.matmul(weights.to(value.dtype), value[:, :, None])
    return output.reshape(batch, -1, new, size)
