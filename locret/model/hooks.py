"""How stock models reach us: hooks and registered functions of their attention layers, a layer's
call as a value, what their releases call the cache, and how compiled ones run uncompiled.

transformers calls the cache `cache` since 5.24, `past_key_values` before. Hooks that run before a
forward see the name its caller used, and stock code warns of the old name. So every hook, call and
output of a stock model goes through `cache_in`, `cache_of` and `as_argument`.

B batch, H KV heads, G query heads a KV head, T new tokens, S slots, D head size.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_outputs import CausalLMOutputWithPast

from locret.cache.cache import RetainedCache
from locret.cache.context import Sequences
from locret.heads.targets import AnswerView
from locret.model.rotary import Rotary, identity_tables

IMPLEMENTATION = "locret"
"""The name under which transformers knows our attention function."""


@dataclass(frozen=True)
class Weighting:
    """What else decides a layer's attention weights, beside the softmax scale.

    Attributes:
        window: a query sees its own slot and the window - 1 before it; None = all.
        softcap: logits become softcap * tanh(logit / softcap); None = they stay as they are.
        sinks: [H*G], a logit for each query head that takes weight and gives no value; None = none.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.window is None and not self.bends

    def of_heads(self, which: slice) -> "Weighting":
        """That of some query heads."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[which])

    @property
    def bends(self) -> bool:
        """The softmax itself is another one, which fused attention does not compute."""
        return self.softcap is not None or self.sinks is not None


PLAIN = Weighting()


@dataclass(frozen=True)
class LayerCall:
    """One attention layer's call, as the backbone made it.

    Attributes:
        layer_idx: the layer, counted among all.
        retained_idx: the layer, counted among those whose units are scored and evicted; None for
            one that attends within a sliding window, which bounds its cache by itself.
        query: [B, H*G, T, D]; key, value: [B, H, T, D]; of one dtype; before RoPE unless `rotated`.
        hidden: [B, T, hidden size], the layer's input.
        scaling: softmax scale.
        rotary: the backbone's rotation; None for a layer without RoPE.
        cache: what the backbone was given.
        output: the layer's output projection, if it has one by the usual name.
        rotated: query and key carry their rotation already, or the layer has no RoPE.
        weighting: what else decides the attention weights.
    """

    layer_idx: int
    retained_idx: int | None
    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    scaling: float
    rotary: Rotary | None
    cache: Any
    output: Any
    rotated: bool = False
    weighting: Weighting = PLAIN

    def rotate_ranges(self, x: Tensor, ranges: Sequence[tuple[int, int, int]]) -> Tensor:
        """`x`, whose tokens fill one range of slots after the other (`Rotary.rotate_ranges`)."""
        return x if self.rotary is None else self.rotary.rotate_ranges(x, ranges)

    @property
    def output_weight(self) -> Tensor | None:
        """[hidden size, H*G * D]; None where it is in fewer bits, in shards, or elsewhere."""
        if hasattr(self.output, "base_layer"):  # an adapter adds to the weight that it wraps
            return None
        weight = getattr(self.output, "weight", None)
        # Quantized tensors that know their way back say so by a method of their own.
        whole = type(weight) in (nn.Parameter, Tensor)
        if weight is None or not (whole or type(weight).dequantize is not Tensor.dequantize):
            return None
        return weight if weight.is_floating_point() and weight.device.type != "meta" else None

    def seen_by(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        norms: Tensor | None = None,
        log_sums: Tensor | None = None,
    ) -> AnswerView:
        """The layer as the last tokens of a text see it.

        Args:
            query: [B, H*G, A, D], theirs, rotated.
            keys, values: [B, H, S, D], of all they see and of themselves, keys rotated.
            norms: [B, A], and log_sums: [B, H*G, A], see `AnswerView`.
        """
        bends = self.weighting.softcap, self.weighting.sinks
        weight = self.output_weight
        return AnswerView(query, keys, values, self.scaling, weight, *bends, norms, log_sums)

    def between(self, start: int, end: int) -> "LayerCall":
        """The same call, for some of its tokens."""
        heads = {name: getattr(self, name)[:, :, start:end] for name in ("query", "key", "value")}
        return replace(self, **heads, hidden=self.hidden[:, start:end])

    def to(self, dtype: torch.dtype) -> "LayerCall":
        """The same call with query, key and value in `dtype`."""
        if self.value.dtype == dtype:
            return self
        heads = {name: getattr(self, name).to(dtype) for name in ("query", "key", "value")}
        return replace(self, **heads)

    def rotate(self, x: Tensor, starts: Sequence[int], prompt_lengths: Sequence[int]) -> Tensor:
        """`x` [B, heads, S, D] at the slots from each row's start on (one start: of all rows);
        unchanged in a layer without RoPE."""
        return x if self.rotary is None else self.rotary.rotate(x, starts, prompt_lengths)

    def rotate_context(
        self, x: Tensor, sequences: Sequences, prompt_lengths: Sequence[int]
    ) -> Tensor:
        """Flat `x` [N, D] at the slots of its sequences (`Rotary.rotate_sequences`)."""
        if self.rotary is None:
            return x
        return self.rotary.rotate_sequences(x, sequences, prompt_lengths)


@dataclass(frozen=True)
class AttentionLayer:
    """An attention layer, and what it does differently from others.

    Attributes:
        layer_idx, retained_idx: see `LayerCall`.
        module: the layer.
        rotary: its rotation; None for a layer without RoPE.
        window: it attends to so many tokens, its own included; None = all.
    """

    layer_idx: int
    retained_idx: int | None
    module: Any
    rotary: Rotary | None
    window: int | None

    def call(
        self,
        hidden: Tensor,
        heads: tuple[Tensor, Tensor, Tensor],
        scaling: float,
        cache: Any,
        rotated: bool = False,
        weighting: Weighting = PLAIN,
    ) -> LayerCall:
        """Its call with query, key and value `heads`, as `LayerCall` has them."""
        query, key, value = heads
        # Under autocast projections give half precision; rotations and norms, float32 again.
        query, key = query.to(value.dtype), key.to(value.dtype)
        output = getattr(self.module, "o_proj", None)
        given = self.layer_idx, self.retained_idx, query, key, value, hidden, scaling
        return LayerCall(*given, self.rotary, cache, output, rotated, weighting)

    @property
    def device(self) -> torch.device:
        """Where the layer computes. ValueError: nowhere: its weights are on the meta device,
        without values elsewhere."""
        for tensor in self.module.parameters():
            if tensor.device.type != "meta":
                return tensor.device
        hooks = (getattr(module, "_hf_hook", None) for module in self.module.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        place = next((place for place in places if place is not None), None)
        if place is None:
            raise ValueError(
                "the model was made on the meta device, where weights have no values; load it with "
                "from_pretrained, or give it values with to_empty and load_state_dict"
            )
        return torch.device(place)


LayerFunction = Callable[[LayerCall], Tensor]
"""Computes a layer's attention output [B, T, H*G, D] from its call."""


class Enough(Exception):
    """Raised by a layer function in the last layer: nobody asks for what would follow."""


Rotation = Callable[[int, Tensor, Any, Rotary | None], tuple[Tensor, Tensor] | None]
"""Given layer index, hidden states, cache and rotary: the tables with which the layer may rotate by
itself, or None if it must hand over queries and keys unrotated."""

Finish = Callable[[Any, Tensor, Tensor], None]
"""Given the cache, input_ids [B, T] and the decoder's output [B, T, hidden size]."""


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
    retained: Callable[..., Tensor] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that stock attention layers call; `retained` is what the attachment handed in.

    The arguments stand in the order of transformers' own attention functions, because kvpress,
    which wraps them all, passes the first six by position. ValueError: the layer is not one that an
    engine is attached to, or a mask was made.
    """
    if retained is None:
        raise ValueError(
            f"attention implementation {IMPLEMENTATION!r} works only through locret.Engine; "
            "load the model with 'sdpa' or 'eager'"
        )
    if attention_mask is not None:
        raise ValueError("locret attends causally and takes no 4D attention mask")
    return retained(query, key, value, scaling, softcap, s_aux), None


def no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Nothing is materialised: the attention function is causal by itself. ValueError:
    `attention_mask` [B, seen + T] holds zeros."""
    if attention_mask is None or torch.compiler.is_compiling():
        return
    if not attention_mask.all():
        raise ValueError(
            "attention_mask holds zeros: inside `with engine:` the attached model takes no "
            "padding; engine.generate does"
        )


def hand_over(
    run: LayerFunction,
    rotation: Rotation | None,
    layer: AttentionLayer,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attention layer: our rotation in, our layer function in."""
    cache = cache_in(kwargs)
    if isinstance(cache, RetainedCache):
        cache.layers[layer.layer_idx].expect_hand_over()
    elif cache is not None:
        raise ValueError(
            f"the attached model was given a {type(cache).__name__}; expected a RetainedCache "
            "(engine.prefill makes one)"
        )

    hidden = args[0] if args else kwargs["hidden_states"]
    tables = None
    if rotation is not None:
        tables = rotation(layer.layer_idx, hidden, cache, layer.rotary)
    rotated = tables is not None

    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        weighting = Weighting(layer.window, softcap, sinks)
        return run(layer.call(hidden, (query, key, value), scaling, cache, rotated, weighting))

    if tables is None:
        tables = identity_tables(*kwargs["position_embeddings"])
    return args, {**kwargs, "position_embeddings": tables, "retained": compute}


def finish_chunk(
    finish: Finish, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook of the decoder."""
    ids = args[0] if args else kwargs.get("input_ids")
    assert ids is not None, "an attached decoder reads tokens, not embeddings"
    finish(cache_in(kwargs), ids, output.last_hidden_state)


CACHE_NAMES = ("cache", "past_key_values")
"""The newest first."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a model, decoder or attention layer, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def as_before(layer: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What an attention layer ran with, as transformers 5.2 would have called it: with
    `past_key_values` and `cache_position`. For hooks of libraries written for it."""
    cache, new = cache_in(arguments), arguments["hidden_states"].shape[1]
    end = cache.get_seq_length(layer.layer_idx)
    return {"cache_position": torch.arange(end - new, end), **arguments, CACHE_NAMES[-1]: cache}


def cache_of(output: Any) -> Any:
    """The cache in what a model or stock `generate` returned.

    Raises:
        AttributeError: it holds none.
    """
    # The old name is an attribute of new outputs too, which warns.
    return output.cache if hasattr(output, CACHE_NAMES[0]) else output.past_key_values


def as_output(logits: Tensor, cache: Any) -> CausalLMOutputWithPast:
    """What a stock model returns with these logits and its cache."""
    fields = CausalLMOutputWithPast.__dataclass_fields__
    name = next(name for name in CACHE_NAMES if name in fields)
    return CausalLMOutputWithPast(logits=logits, **{name: cache})


def as_argument(module: nn.Module, cache: Any, method: str = "forward") -> dict[str, Any]:
    """`{name: cache}`, under the name that a method of `module` takes.

    Args:
        method: "forward" or "generate".

    Raises:
        ValueError: the method takes no cache under either name.
    """
    # Stock `generate` takes any keyword and hands it on to this.
    takes = "prepare_inputs_for_generation" if method == "generate" else method
    kind: Any = type(module)
    return {_name(kind, takes): cache}


@functools.cache
def _name(kind: Any, method: str) -> str:
    """A method of `**kwargs` alone reveals nothing, so that base classes are searched."""
    for each in kind.__mro__:
        if method in vars(each):
            taken = inspect.signature(vars(each)[method]).parameters
            for name in CACHE_NAMES:
                if name in taken:
                    return name
    raise ValueError(
        f"{kind.__name__}.{method} takes no cache: expected a parameter called "
        f"{' or '.join(map(repr, CACHE_NAMES))}; is it a transformers causal language model?"
    )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which tensors of `device` keep their dtypes: PyTorch refuses to put float16 ones
    side by side under autocast to bfloat16, and tables of codes are such."""
    if not autocasts(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a kind of device; "meta" knows none."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_compiling(module: Any) -> Any:
    """The module that `torch.compile(module)` wraps; any other module as it is."""
    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    return module


def is_compiled(module: Any) -> bool:
    """Whether a call of the module runs compiled code: by `torch.compile(module)`,
    `module.compile()` or a compiled `forward`."""
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


class RunningUncompiled:
    """A context in which compiled modules run as they are written.

    Compiled code does not call hooks that were added later, so that layers would not reach us, and
    our Python cannot be compiled. The compiler's stance is one for all threads, which may enter and
    leave in any order: the first changes it and the last changes it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def __exit__(self, *exception: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.__exit__(*exception)


running_uncompiled = RunningUncompiled()
