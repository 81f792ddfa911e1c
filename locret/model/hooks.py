"""How stock attention layers reach us: the registered functions, a layer's call as a value, and how
compiled models run uncompiled.

B batch, H KV heads, G query heads a KV head, T new tokens, S slots, D head size.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import AttentionInterface, AttentionMaskInterface

from locret.model.attend import PLAIN, Weighting
from locret.model.rotary import Rotary

IMPLEMENTATION = "locret"
"""The name under which transformers knows our attention function."""


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

    def rotate_packed(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """`x` with sequences of these lengths one after the other, each rotated from slot 0 on."""
        return x if self.rotary is None else self.rotary.rotate_packed(x, lengths)

    @property
    def output_weight(self) -> Tensor | None:
        """[hidden size, H*G * D]; None where it is stored in fewer bits, in parts, or elsewhere."""
        if hasattr(self.output, "base_layer"):  # an adapter adds to the weight that it wraps
            return None
        weight = getattr(self.output, "weight", None)
        # Quantized tensors that know their way back say so by a method of their own.
        whole = type(weight) in (nn.Parameter, Tensor)
        if weight is None or not (whole or type(weight).dequantize is not Tensor.dequantize):
            return None
        return weight if weight.is_floating_point() and weight.device.type != "meta" else None

    def part(self, start: int, end: int) -> "LayerCall":
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
    retained: Callable[..., Tensor] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
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
    return retained(query, key, value, scaling, softcap, s_aux), None


def no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Nothing is materialised: the attention function is causal by itself.

    Raises:
        ValueError: `attention_mask` [B, seen + T] holds zeros.
    """
    if attention_mask is None or torch.compiler.is_compiling():
        return
    if not attention_mask.all():
        raise ValueError(
            "attention_mask holds zeros: inside `with engine:` the attached model takes no "
            "padding; engine.generate does"
        )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which tensors of `device` keep their dtypes: PyTorch refuses to put float16 ones
    side by side under autocast to bfloat16, and tables of codes are such."""
    known = torch.amp.is_autocast_available(device.type)  # "meta" is not
    if not known or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


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
