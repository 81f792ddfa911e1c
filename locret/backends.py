"""Causal attention of new tokens over slots: one interface, several ways to compute it.

eager       plain PyTorch, the twin that tests compare the others with; takes T x S memory a head.
sdpa        PyTorch's scaled_dot_product_attention, lower-right causal; runs everywhere.
cudnn       the past in full and the new tokens in a causal square, two cuDNN calls merged by
            log-sum-exp: the fastest on NVIDIA GPUs from Ampere on, in half precision.
flash_attn  the flash-attn package (extra `flash`).

B batch, H KV heads, G query heads a KV head, T new tokens, S slots, D head size.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from locret.kernels.merge import merge_parts

Backend = Literal["eager", "sdpa", "cudnn", "flash_attn"]

SPLIT_FROM = 128  # new tokens; below that two calls and a merge cost more than one call


def available(backend: Backend, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Why a backend cannot run heads of `size` channels there; None if it can.

    Raises:
        ValueError: no backend of that name.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is unknown; expected one of {get_args(Backend)}")
    if backend in ("eager", "sdpa"):
        return None
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"it needs a CUDA device and half precision, and the model is {dtype} on {device}"
    if backend == "flash_attn":
        found = importlib.util.find_spec("flash_attn") is not None
        return None if found else "the package flash-attn is not installed (extra 'flash')"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "cuDNN attention needs an NVIDIA GPU of compute capability 8.0 or newer"
    if size % 8 or size > 128:
        return f"cuDNN attention needs heads of at most 128 channels, in eights; these have {size}"
    return None


def fastest(device: torch.device, dtype: torch.dtype, size: int) -> Backend:
    """The backend to use where nobody chose one."""
    return "sdpa" if available("cudnn", device, dtype, size) else "cudnn"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    backend: Backend,
    empty: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T of S slots.

    Query t sees the slots 0 .. S - T + t (lower-right causal), but for the empty ones.

    Args:
        query: [B, H*G, T, D], rotated. key, value: [B, H, S, D], S >= T, rotated.
        scaling: softmax scale.
        backend: see the file's head.
        empty: [B, H] long: leading slots that hold nothing. A query always sees its own slot.

    Returns:
        [B, T, H*G, D].
    """
    if backend == "eager":
        output = _attend_eager(query, key, value, scaling, empty)
    elif backend == "flash_attn" and empty is None:
        return _attend_flash(query, key, value, scaling)
    else:
        output = _attend_sdpa(query, key, value, scaling, empty)
    return output.transpose(1, 2).contiguous()


def attend_past(
    query: Tensor,
    past: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    scaling: float,
    backend: Backend,
    empty: Tensor | None = None,
) -> Tensor:
    """`attend` where keys and values of the past [B, H, S - T, D] and of the new tokens
    [B, H, T, D] lie apart."""
    tokens, held = query.shape[2], past[0].shape[2]
    if not held:
        return attend(query, *new, scaling, backend, empty)
    if backend == "cudnn" and tokens >= SPLIT_FROM and empty is None:
        return merge_parts(
            *_cudnn(query, *past, scaling, causal=False), *_cudnn(query, *new, scaling, causal=True)
        )
    keys, values = (torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))
    return attend(query, keys, values, scaling, backend, empty)


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, H*G, T, D] and log-sum-exp [B, H*G, T] (natural, float32)."""
    output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scaling
    )
    return output, logsumexp.reshape(query.shape[:3])


def _attend_sdpa(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, empty: Tensor | None
) -> Tensor:
    new, slots = query.shape[2], key.shape[2]
    # SDPA's own is_causal is aligned upper-left, which is right only for a square.
    square = new == slots and new > 1
    mask: Any = None if square or new == 1 else causal_lower_right(new, slots)
    if empty is not None:
        mask, square = _visible(query, key, empty), False
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=square, scale=scaling, enable_gqa=True
    )


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    run = _flash_function()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return run(q, k, v, softmax_scale=scaling, causal=True)  # lower-right causal by itself


@functools.cache
def _flash_function() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_func

    return flash_attn_func


def _attend_eager(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, empty: Tensor | None
) -> Tensor:
    batch, heads, slots, size = key.shape
    new = query.shape[2]
    grouped = query.reshape(batch, heads, -1, new, size)
    logits = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)) * scaling
    if empty is None:
        future = torch.ones(new, slots, dtype=torch.bool, device=key.device).triu(slots - new + 1)
        logits = logits.masked_fill(future, -torch.inf)
    else:
        visible = _visible(query, key, empty).reshape(batch, heads, -1, new, slots)
        logits = logits.masked_fill(~visible, -torch.inf)
    weights = logits.softmax(dim=-1, dtype=torch.float32)
    output = torch.matmul(weights.to(value.dtype), value[:, :, None])
    return output.reshape(batch, -1, new, size)


def _visible(query: Tensor, key: Tensor, empty: Tensor) -> Tensor:
    """Which slots each query sees: bool [B, H*G, T, S]."""
    new, slots = query.shape[2], key.shape[2]
    slot = torch.arange(slots, device=key.device)
    own = slot[slots - new :, None]
    filled = slot >= empty[:, :, None, None]
    mask = (slot == own) | ((slot <= own) & filled)
    return mask.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
