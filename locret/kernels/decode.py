"""Attention of one or a few new tokens over storage whose filled length only the device knows.

Split-KV flash decoding: the units of a KV head are divided among programs that each read their
keys and values once, for all query heads of the group, with an online softmax in float32; a second
kernel merges the parts by their log-sum-exp. The number of parts is fixed by shapes, what a part
covers by the current length: a captured CUDA graph stays right and balanced while the length grows.
"""

import functools

import torch
from torch import Tensor

from locret.kernels.dispatch import (
    multiprocessors,
    takes_triton,
)
from locret.kernels.parts import Parts
from locret.kernels.storage_parts import attend_storage

_LEAST_PART = 128  # units of the capacity that are worth a program of their own
_PROGRAMS = 2  # programs that share a multiprocessor
_ROWS = 128  # query rows (G * T) that one program holds


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scaling: float,
    first: Tensor | None = None,
) -> Tensor:
    """softmax(scaling q k) v over the slots first .. length - 1 of the storage.

    With T > 1 the tokens are the last of those slots, causal: token t sees the slots below
    length - (T - 1 - t).

    Args:
        query: [B, H*G, T, D], rotated; G*T at most 128.
        keys, values: [B, H, C, D], storage of capacity C in query's dtype, any strides. What lies
            outside first .. length - 1 may hold anything.
        length: [1] int32 on the same device: slots filled, the new tokens' included; at most C.
        scaling: factor of the logits.
        first: [B, H] int32, the first slot that a head attends to; None = 0.

    Returns:
        [B, H*G, T, D] in query's dtype; zeros where a token sees no slot.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_decode(query, keys, values, length, first)
    tensors = [query, keys, values, length] + ([] if first is None else [first])
    if not takes_triton(*tensors):
        return decode_attention_reference(query, keys, values, length, scaling, first)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel():
        _launch(query, keys, values, length, scaling, first, out)
    return out


def decode_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scaling: float,
    first: Tensor | None = None,
) -> Tensor:
    """The twin of `decode_attention`, in plain PyTorch."""
    batch, heads, capacity, _ = keys.shape
    grouped = query.unflatten(1, (heads, -1)).float()  # [B, H, G, T, D]
    new = query.shape[2]
    slot = torch.arange(capacity, device=query.device)
    visible = slot < length - (new - 1 - torch.arange(new, device=query.device))[:, None]
    if first is not None:
        visible = visible & (slot >= first[..., None, None])  # [B, H, T, C]
    visible = visible.expand(batch, heads, new, capacity)
    logits = scaling * torch.einsum("bhgtd,bhsd->bhgts", grouped, keys.float())
    logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    seen = visible.any(2)[..., None]  # slots that nobody sees may hold NaN
    out = torch.einsum("bhgts,bhsd->bhgtd", weights, values.float().masked_fill(~seen, 0.0))
    return out.flatten(1, 2).to(query.dtype)


def check_decode(
    query: Tensor, keys: Tensor, values: Tensor, length: Tensor, first: Tensor | None
) -> None:
    """Refuse what does not fit; arguments as of `decode_attention`."""
    batch, heads, _, size = keys.shape
    if keys.shape != values.shape or not query.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"query {query.dtype}, keys {tuple(keys.shape)} {keys.dtype} and values "
            f"{tuple(values.shape)} {values.dtype} do not fit: expected equal shapes and dtypes"
        )
    if query.shape[0] != batch or query.shape[3] != size or query.shape[1] % heads:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit keys {tuple(keys.shape)}: expected "
            f"[{batch}, a multiple of {heads}, T, {size}]"
        )
    if query.shape[1] // heads * query.shape[2] > _ROWS:
        raise ValueError(
            f"query {tuple(query.shape)} on {heads} KV heads makes more than {_ROWS} rows a KV "
            "head; read so many tokens with an attention backend"
        )
    if length.shape != (1,) or length.dtype != torch.int32:
        raise ValueError(f"length is {tuple(length.shape)} {length.dtype}; expected [1] int32")
    if first is not None and (first.shape != (batch, heads) or first.dtype != torch.int32):
        raise ValueError(
            f"first is {tuple(first.shape)} {first.dtype}; expected [{batch}, {heads}] int32"
        )


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scaling: float,
    first: Tensor | None,
    out: Tensor,
) -> None:
    batch, heads, capacity, _ = keys.shape
    count = number_of_parts(batch * heads, capacity, multiprocessors(query.device))
    parts = Parts.empty(query, heads, count)
    attend_storage(query, keys, values, length, scaling, first, parts, 0, count)
    parts.merge(out)


@functools.cache
def number_of_parts(heads: int, capacity: int, multiprocessors: int) -> int:
    """Programs that share a KV head's units, for `heads` KV heads in all.

    The fewest among those that finish soonest, if programs run in rounds of what fits the device.
    """
    at_once = _PROGRAMS * multiprocessors
    most = max(1, min(-(-capacity // _LEAST_PART), -(-4 * at_once // heads)))
    return min(range(1, most + 1), key=lambda parts: -(-heads * parts // at_once) / parts)
