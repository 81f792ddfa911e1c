"""Attention over keys and values as they are, in parts to be merged (`parts.py`): split-KV flash
decoding. The parts may stand beside those of packed units.
"""

import math

import torch
from torch import Tensor

from locret.kernels.dispatch import (
    INTERPRETED,
    on_device,
    padded,
    tl,
    triton,
)
from locret.kernels.parts import Parts, average, log_sum, weigh


def attend_storage(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scaling: float,
    first: Tensor | None,
    parts: Parts,
    at_part: int,
    count: int,
    before: int = 0,
) -> None:
    """Leave the attention over some storage in `count` parts of `parts`, from `at_part` on.

    Args:
        before: slots that come before this storage's; `first` counts them, `length` does not.
    """
    batch, heads, capacity, size = keys.shape
    new = query.shape[2]
    rows = query.shape[1] // heads * new
    wide = padded(size, least=16)
    with on_device(query):
        _attend[(count, heads, batch)](
            *(query, keys, values, length, length if first is None else first),
            *(parts.values, parts.weights, at_part, parts.count),
            *(scaling * math.log2(math.e), capacity, before),
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
            UPCAST=INTERPRETED or query.dtype == torch.float32,
            num_warps=8 if query.dtype == torch.float32 else 4,
            num_stages=3,
        )


# Nothing is compiled anew for these, which differ from prompt to prompt.
@triton.jit(do_not_specialize=["at_part", "all_parts", "capacity", "before", "first_b", "first_h"])
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    length,
    first,
    part_values,
    part_weights,
    at_part,
    all_parts,
    scaling,
    capacity,
    before,
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
    UPCAST: tl.constexpr,  # the interpreter multiplies bfloat16 blocks as integers
):
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)

    # An equal part of what is filled now.
    end = tl.minimum(tl.load(length), capacity)
    start = tl.full((), 0, tl.int32)
    if HAS_FIRST:
        start = tl.maximum(tl.load(first + b * first_b + h * first_h) - before, 0)
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
        weights, shrink, highest, total = weigh(logits, highest, total)
        summed *= shrink[:, None]
        summed = tl.dot(weights.to(v.dtype), v, acc=summed, input_precision="ieee")
        k_at += UNITS * k_s
        v_at += UNITS * v_s

    at_row = ((b * tl.num_programs(1) + h) * all_parts + at_part + part) * ROWS + row
    tl.store(part_weights + at_row, log_sum(highest, total), mask=row < ROWS)
    at_values = part_values + at_row[:, None] * SIZE + d[None, :]
    mask = (row < ROWS)[:, None] & in_size[None, :]
    tl.store(at_values, average(summed, total), mask=mask)
