"""Attention of one or a few new tokens over storage whose filled length only the device knows.

Split-KV flash decoding: the units of a KV head are divided among programs that each read their
keys and values once, for all query heads of the group, with an online softmax in float32; a second
kernel merges the parts by their log-sum-exp. The number of parts is fixed by shapes, what a part
covers by the current length: a captured CUDA graph stays right and balanced while the length grows.
"""

import functools
import math

import torch
from torch import Tensor

from locret.kernels.dispatch import (
    INTERPRETED,
    multiprocessors,
    on_device,
    padded,
    takes_triton,
    tl,
    triton,
)
from locret.kernels.parts import Parts

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
    batch, heads, capacity, size = keys.shape
    new = query.shape[2]
    rows = query.shape[1] // heads * new
    count = number_of_parts(batch * heads, capacity, multiprocessors(query.device))
    parts = Parts.empty(query, heads, count)
    wide = padded(size, least=16)
    with on_device(query):
        _attend[(count, heads, batch)](
            *(query, keys, values, length, length if first is None else first),
            *(parts.values, parts.weights, scaling * math.log2(math.e), capacity),
            *query.stride(),
            *keys.stride(),
            *values.stride(),
            *((0, 0) if first is None else first.stride()),
            HAS_FIRST=first is not None,
            NEW=new,
            ROWS=rows,
            SIZE=size,
            ROW_BLOCK=padded(rows, least=16),
            SIZE_BLOCK=wide,
            UNITS=min(128, max(16, 16384 // (wide * query.element_size()))),
            # The interpreter multiplies bfloat16 blocks as integers.
            UPCAST=INTERPRETED or query.dtype == torch.float32,
            num_warps=8 if query.dtype == torch.float32 else 4,
            num_stages=3,
        )
    parts.merge(out)


@functools.cache
def number_of_parts(heads: int, capacity: int, multiprocessors: int) -> int:
    """Programs that share a KV head's units, for `heads` KV heads in all.

    The fewest among those that finish soonest, if programs run in rounds of what fits the device.
    """
    at_once = _PROGRAMS * multiprocessors
    most = max(1, min(-(-capacity // _LEAST_PART), -(-4 * at_once // heads)))
    return min(range(1, most + 1), key=lambda parts: -(-heads * parts // at_once) / parts)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    length,
    first,
    partial,
    weight,
    scaling,
    capacity,
    q_b,
    q_h,
    q_t,
    q_d,
    k_b,
    k_h,
    k_s,
    k_d,
    v_b,
    v_h,
    v_s,
    v_d,
    first_b,
    first_h,
    HAS_FIRST: tl.constexpr,
    NEW: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)

    # An equal part of what is filled now.
    end = tl.minimum(tl.load(length), capacity)
    start = tl.full((), 0, tl.int32)
    if HAS_FIRST:
        start = tl.maximum(tl.load(first + b * first_b + h * first_h), 0)
    each = tl.cdiv(tl.maximum(end - start, 0), parts)
    start += part * each
    stop = tl.minimum(start + each, end)

    row = tl.arange(0, ROW_BLOCK)
    d = tl.arange(0, SIZE_BLOCK)
    in_size = d < SIZE
    q_head = h * (ROWS // NEW) + row // NEW
    q_at = query + b * q_b + q_head[:, None] * q_h + (row % NEW)[:, None] * q_t
    q = tl.load(q_at + d[None, :] * q_d, mask=(row < ROWS)[:, None] & in_size[None, :], other=0.0)
    row_end = end - (NEW - 1 - row % NEW)
    if UPCAST:
        q = q.to(tl.float32)

    unit = tl.arange(0, UNITS)
    keys += b * k_b + h * k_h + start.to(tl.int64) * k_s
    values += b * v_b + h * v_h + start.to(tl.int64) * v_s
    k_at = keys + d[:, None] * k_d + unit[None, :] * k_s  # transposed
    v_at = values + unit[:, None] * v_s + d[None, :] * v_d

    highest = tl.full((ROW_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_BLOCK,), tl.float32)
    summed = tl.zeros((ROW_BLOCK, SIZE_BLOCK), tl.float32)
    for at in tl.range(start, stop, UNITS):
        here = at + unit < stop
        k = tl.load(k_at, mask=here[None, :] & in_size[:, None], other=0.0)
        v = tl.load(v_at, mask=here[:, None] & in_size[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logits = tl.dot(q, k, input_precision="ieee") * scaling
        if NEW == 1:
            logits = tl.where(here[None, :], logits, float("-inf"))
        else:
            visible = here[None, :] & ((at + unit)[None, :] < row_end[:, None])
            logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # A row that has seen nothing yet has no highest logit to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, 1)
        summed = tl.dot(
            weights.to(v.dtype), v, acc=summed * shrink[:, None], input_precision="ieee"
        )
        highest = higher
        k_at += UNITS * k_s
        v_at += UNITS * v_s

    # log2 of the part's sum of weights; a part without units stays out of the merge.
    at_row = ((b * tl.num_programs(1) + h) * parts + part) * ROWS + row
    kept = row < ROWS
    some = total > 0.0
    log_sum = tl.where(some, highest + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(weight + at_row, log_sum, mask=kept)
    summed = summed / tl.where(some, total, 1.0)[:, None]
    at_partial = partial + at_row[:, None] * SIZE + d[None, :]
    tl.store(at_partial, summed, mask=kept[:, None] & in_size[None, :])
