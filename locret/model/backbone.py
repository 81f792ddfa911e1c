"""The only file that knows architectures: what is supported, why not, and how to attach.

While attached, every attention layer of a stock model gets, through one forward pre-hook,
  - identity position embeddings (cos = 1, sin = 0), so that whatever the architecture does to its
    queries and keys (fused projections, q/k norms), they arrive **unrotated**;
  - the layer function that does the rest of the layer (`locret.model.hooks`).
No method is reassigned and nothing is left behind after detaching.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from locret.heads.heads import Geometry
from locret.model.backends import Backend
from locret.model.hooks import (
    IMPLEMENTATION,
    AttentionLayer,
    Finish,
    LayerFunction,
    Rotation,
    finish_chunk,
    hand_over,
    is_compiled,
    register,
    running_uncompiled,
    without_compiling,
)
from locret.model.rotary import LongRopeRule, Rotary

SUPPORTED = (
    "cohere",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt_oss",
    "granite",
    "helium",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""`config.model_type` of the architectures that the parity tests cover."""

PRENORM = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Those whose layers are what `locret.model.prenorm` says."""


class Backbone:
    """A stock causal language model, seen as a stack of attention layers.

    Args:
        model: a stock transformers model, or one that carries a PEFT adapter.
        longrope: LongRoPE rule (`locret.model.rotary`).

    Raises:
        ValueError: the architecture is not supported; says why, and which are.
    """

    def __init__(self, model: Any, longrope: LongRopeRule = "long") -> None:
        model = stock = without_compiling(model)
        if hasattr(model, "get_base_model"):
            stock = without_compiling(model.get_base_model())
        config = getattr(stock, "config", None)
        if config is None or not (hasattr(stock, "get_decoder") and hasattr(stock, "generate")):
            raise ValueError(f"expected a transformers causal language model, got {type(model)}")
        check_supported(config)
        adapter = getattr(model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"the model carries a {adapter.peft_type.value} adapter, which puts learned units "  # type: ignore[union-attr]
                "in front of the prompt; expected one that changes weights, such as LoRA"
            )
        self.model: Any = stock
        self.decoder: Any = without_compiling(stock.get_decoder())
        self.config = self.decoder.config
        attentions = [without_compiling(layer.self_attn) for layer in self.decoder.layers]
        apply = sys.modules[type(attentions[0]).__module__].apply_rotary_pos_emb
        rotary = self.decoder.rotary_emb
        # A model makes no tables for a type that no layer has.
        had = getattr(self.config, "layer_types", None) or ()
        named = [each for each in _by_type(rotary.config.rope_parameters or {}) if each in had]
        types: list[str | None] = [*named] or [None]
        # By layer type, or that of all layers as None.
        self._rotaries = {each: Rotary(rotary, apply, longrope, each) for each in types}
        self.longrope = next((r.longrope for r in self._rotaries.values() if r.longrope), None)
        self.windows = _windows(self.config)
        self.layers = _layers(attentions, self.config, self._rotaries, self.windows)

    @property
    def retained(self) -> list[AttentionLayer]:
        """The layers whose units are scored and evicted."""
        return [layer for layer in self.layers if layer.retained_idx is not None]

    @property
    def geometry(self) -> Geometry:
        """Of the layers that are retained: those with a sliding window have no heads."""
        config = self.config
        return Geometry(
            num_layers=len(self.retained),
            num_query_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_size=int(self.layers[0].module.head_dim),
            hidden_size=config.hidden_size,
            activation=getattr(config, "hidden_act", None) or config.hidden_activation,
        )

    @property
    def rotary(self) -> Rotary:
        """The rotation of all retained layers that have one, where they agree (`takes_steps`)."""
        any_of = next(iter(self._rotaries.values()))
        return next((layer.rotary for layer in self.retained if layer.rotary is not None), any_of)

    @property
    def devices(self) -> set[torch.device]:
        """Where the layers compute."""
        return {layer.device for layer in self.layers}

    @property
    def softcapped(self) -> bool:
        """Some layer caps its logits."""
        return is_softcapped(self.config)

    @property
    def takes_steps(self) -> bool:
        """All layers weigh by an ordinary softmax, and those that retain their units rotate alike:
        what one-token steps on the device can compute (`locret.engine.steps`)."""
        bent = any(getattr(x.module, "sinks", None) is not None for x in self.layers)
        rotaries = {id(layer.rotary) for layer in self.retained if layer.rotary is not None}
        return not (bent or self.softcapped or len(rotaries) > 1)

    @property
    def plain(self) -> bool:
        """The same, and all layers retain their units and have one rotation."""
        return self.takes_steps and not any(self.windows) and len(self._rotaries) == 1

    @property
    def backend(self) -> Backend:
        """The attention backend that matches the one the model was loaded with."""
        # Models that SDPA alone cannot compute load as eager, though no caller wants it.
        eager = self.config._attn_implementation == "eager" and self.model._supports_sdpa
        return "eager" if eager else "sdpa"

    @contextlib.contextmanager
    def attached(
        self, run: LayerFunction, rotation: Rotation | None = None, finish: Finish | None = None
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
            if any(map(is_compiled, self._on_the_way)):
                stack.enter_context(running_uncompiled)
            stack.callback(self.model.set_attn_implementation, before)
            self.model.set_attn_implementation(IMPLEMENTATION)
            for layer in self.layers:
                hook = functools.partial(hand_over, run, rotation, layer)
                handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            if finish is not None:
                after = functools.partial(finish_chunk, finish)
                handle = self.decoder.register_forward_hook(after, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    @property
    def _on_the_way(self) -> Iterator[Any]:
        """The modules whose calls lead to an attention layer, itself included, as they are now."""
        modules = dict(self.model.named_modules())
        ours = {layer.module for layer in self.layers}
        for path in [name.split(".") for name, module in modules.items() if module in ours]:
            yield from (modules[".".join(path[:count])] for count in range(len(path) + 1))

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model says of the next token, float32 [..., vocabulary].

        Args:
            hidden: the decoder's output, [..., hidden size].
        """
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits * getattr(self.model, "logit_scale", 1)  # Cohere
        logits = logits / getattr(self.config, "logits_scaling", 1)  # Granite
        softcap = getattr(self.config, "final_logit_softcapping", None)  # Gemma 2
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def surprise(self, hidden: Tensor, next_ids: Tensor) -> Tensor:
        """-log p of the tokens that came next, [B, T] float32.

        Args:
            hidden: the decoder's output, [B, T, hidden size].
            next_ids: [B, T] long.
        """
        logits = self.logits(hidden)
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


def check_supported(config: Any) -> None:
    """Refuse what locret does not cover. ValueError: says why, and lists what is supported."""
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
    if hasattr(config, "text_config"):
        return "it reads more than text; load its language model alone"
    if config.model_type not in SUPPORTED:
        layer_types = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
        if layer_types:
            return f"it has {', '.join(layer_types)} layers, which need a cache of their own"
        return "its attention has not been tested against locret's"
    if getattr(config, "use_bidirectional_attention", False):
        return "it attends to later tokens as well; locret needs a causal decoder"
    rope = getattr(config, "rope_parameters", None) or {}
    if any("dynamic" in str(each.get("rope_type")) for each in (rope, *_by_type(rope).values())):
        return "dynamic NTK RoPE changes with the length, so that cached keys go stale"
    return None


def is_softcapped(config: Any) -> bool:
    """Whether attention of a model of this transformers config caps its logits."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def _windows(config: Any) -> tuple[int | None, ...]:
    """The sliding window of each layer; None where it spans all that the model can read."""
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= config.max_position_embeddings:
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * config.num_hidden_layers
    return tuple(window if each == "sliding_attention" else None for each in types)


def _by_type(rope: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """RoPE parameters by layer type, where layers of different types rotate differently."""
    return {name: each for name, each in rope.items() if isinstance(each, dict)}


def _layers(
    attentions: list[Any],
    config: Any,
    rotaries: dict[str | None, Rotary],
    windows: tuple[int | None, ...],
) -> list[AttentionLayer]:
    layers, retained = [], itertools.count()
    types = getattr(config, "layer_types", None) or [None] * len(attentions)
    for i, (attention, window) in enumerate(zip(attentions, windows, strict=True)):
        rotary = rotaries.get(types[i]) or rotaries.get(None)
        layers.append(
            AttentionLayer(
                i,
                next(retained) if window is None else None,
                attention,
                rotary if _uses_rope(attention, config) else None,
                window,
            )
        )
    return layers


def _uses_rope(attention: Any, config: Any) -> bool:
    if config.model_type == "exaone4":  # hybrid ones rotate in sliding layers only
        return attention.sliding_window is None or attention.is_sliding
    return bool(getattr(attention, "use_rope", True))
