"""The only file that knows architectures: what is supported, why not, and how to attach.

While attached, every attention layer of a stock model gets, through one forward pre-hook,
  - identity position embeddings (cos = 1, sin = 0), so that whatever the architecture does to its
    queries and keys (fused projections, q/k norms), they arrive **unrotated**;
  - the layer function that does the rest of the layer (`locret.attention`).
No method is reassigned and nothing is left behind after detaching.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from locret.attention import IMPLEMENTATION, LayerCall, LayerFunction, register
from locret.backends import Backend
from locret.cache import RetainedCache
from locret.heads import Geometry
from locret.identity import identity_tables
from locret.rotary import LongRopeRule, Rotary

SUPPORTED = (
    "cohere",
    "glm",
    "glm4",
    "granite",
    "helium",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)
"""`config.model_type` of the architectures that the parity tests cover."""


Rotation = Callable[[int, Tensor, Any, Rotary | None], tuple[Tensor, Tensor] | None]
"""Given layer index, hidden states, cache and rotary: the tables with which the layer may rotate by
itself, or None if it must hand over queries and keys unrotated."""

Finish = Callable[[Any, Tensor, Tensor], None]
"""Given the cache, input_ids [B, T] and the decoder's output [B, T, hidden size]."""


class Backbone:
    """A stock causal language model, seen as a stack of attention layers.

    Args:
        model: a stock transformers model, or one that carries a PEFT adapter.
        longrope: LongRoPE rule (`locret.rotary`).

    Raises:
        ValueError: the architecture is not supported; says why, and which are.
    """

    def __init__(self, model: Any, longrope: LongRopeRule = "long") -> None:
        stock: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = getattr(stock, "config", None)
        if config is None or not (hasattr(stock, "get_decoder") and hasattr(stock, "generate")):
            raise ValueError(f"expected a transformers causal language model, got {type(model)}")
        check_supported(config)
        self.model: Any = stock
        self.decoder: Any = stock.get_decoder()
        self.config = self.decoder.config
        self.attentions: list[Any] = [layer.self_attn for layer in self.decoder.layers]
        apply = sys.modules[type(self.attentions[0]).__module__].apply_rotary_pos_emb
        self.rotary = Rotary(self.decoder.rotary_emb, apply, longrope)

    @property
    def geometry(self) -> Geometry:
        first = self.attentions[0]
        return Geometry(
            num_layers=len(self.attentions),
            num_query_heads=self.config.num_attention_heads,
            num_kv_heads=self.config.num_key_value_heads,
            head_size=int(first.head_dim),
            hidden_size=self.config.hidden_size,
            activation=self.config.hidden_act,
        )

    @property
    def backend(self) -> Backend:
        """The attention backend that matches the one the model was loaded with."""
        return "eager" if self.config._attn_implementation == "eager" else "sdpa"

    @contextlib.contextmanager
    def attached(
        self,
        run: LayerFunction,
        rotation: Rotation | None = None,
        finish: Finish | None = None,
    ) -> Iterator[None]:
        """Let `run` compute every attention layer, until the block ends, however it ends.

        Args:
            run: the layer function.
            rotation: when layers may rotate by themselves; None = never.
            finish: called after the last layer; None = nothing is.

        Raises:
            ValueError: something is attached to this model already.
        """
        before = self.config._attn_implementation
        if before == IMPLEMENTATION:
            raise ValueError(
                "this model already has an engine attached; leave its `with` block or close() it"
            )
        register()
        with contextlib.ExitStack() as stack:
            stack.callback(self.model.set_attn_implementation, before)
            self.model.set_attn_implementation(IMPLEMENTATION)
            for layer_idx, attention in enumerate(self.attentions):
                rotary = self.rotary if getattr(attention, "use_rope", True) else None
                hook = functools.partial(_hand_over, run, rotation, layer_idx, rotary)
                handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            if finish is not None:
                after = functools.partial(_finish, finish)
                handle = self.decoder.register_forward_hook(after, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def surprise(self, hidden: Tensor, next_ids: Tensor) -> Tensor:
        """-log p of the tokens that came next, [B, T] float32.

        Args:
            hidden: the decoder's output, [B, T, hidden size].
            next_ids: [B, T] long.
        """
        logits = self.model.get_output_embeddings()(hidden).float()
        logits = logits * getattr(self.model, "logit_scale", 1)  # Cohere
        logits = logits / getattr(self.config, "logits_scaling", 1)  # Granite
        chosen = logits.gather(-1, next_ids[..., None].to(logits.device))[..., 0]
        return logits.logsumexp(dim=-1) - chosen

    @contextlib.contextmanager
    def fixed_frequencies(self) -> Iterator[None]:
        """Keep the stock rotary module from choosing its factors by length until the block ends:
        that would wait for the device, which nothing may do while a graph is recorded."""
        module = self.decoder.rotary_emb
        before = getattr(module, "rope_type", None)
        if before != "longrope":
            yield
            return
        module.rope_type = "default"
        try:
            yield
        finally:
            module.rope_type = before


def _hand_over(
    run: LayerFunction,
    rotation: Rotation | None,
    layer_idx: int,
    rotary: Rotary | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attention layer: our rotation in, our layer function in."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, RetainedCache):
        cache.layers[layer_idx].expect_hand_over()
    elif cache is not None:
        raise ValueError(
            f"the attached model was given a {type(cache).__name__}; expected a RetainedCache "
            "(engine.prefill makes one)"
        )

    hidden = args[0] if args else kwargs["hidden_states"]
    tables = rotation(layer_idx, hidden, cache, rotary) if rotation is not None else None
    rotated = tables is not None

    def compute(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return run(
            LayerCall(
                layer_idx,
                query,
                key,
                value,
                hidden,
                scaling,
                rotary,
                cache,
                getattr(module, "o_proj", None),
                rotated,
            )
        )

    if tables is None:
        tables = identity_tables(*kwargs["position_embeddings"])
    return args, {**kwargs, "position_embeddings": tables, "retained": compute}


def _finish(
    finish: Finish, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook of the decoder."""
    ids = args[0] if args else kwargs.get("input_ids")
    assert ids is not None, "an attached decoder reads tokens, not embeddings"
    finish(kwargs.get("past_key_values"), ids, output.last_hidden_state)


def check_supported(config: Any) -> None:
    """Refuse what locret does not cover.

    Raises:
        ValueError: says why, and lists what is supported.
    """
    reason = _why_not(config)
    if reason is not None:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported: {reason}. "
            f"Supported: {', '.join(SUPPORTED)}"
        )


def _why_not(config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; locret needs a causal decoder"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention (MLA) caches no keys and values to keep or evict"
    if config.model_type not in SUPPORTED:
        layer_types = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
        if layer_types:
            return f"it has {', '.join(layer_types)} layers, which need a cache of their own"
        return "its attention has not been tested against locret's"
    if _slides(config):
        return (
            f"its layers attend within a sliding window of {config.sliding_window} tokens, "
            "which needs a cache of its own"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if "dynamic" in str(rope.get("rope_type")):
        return "dynamic NTK RoPE changes with the length, so that cached keys go stale"
    return None


def _slides(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return False
    layer_types = getattr(config, "layer_types", None)
    return layer_types is None or "sliding_attention" in layer_types
