"""Rotate the query and the key of a step and store key and value in the tail, in one launch; with
the norms of queries and keys where an architecture has them.

The slot is read on the device, and cos and sin are looked up there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from locret.kernels.add_norm import norm_reference
from locret.kernels.decode import store_units_reference
from locret.kernels.dispatch import (
    check_tensors,
    on_device,
    padded,
    takes_triton,
    tl,
    triton,
    units_at,
)
from locret.kernels.rotate import rotate_at_slots_reference


class Tables(NamedTuple):
    """cos and sin [1 or B, C, R] of the tail's slots, as `rotate_at_slots` takes them, its partners
    being R / 2 apart ("half")."""

    cos: Tensor
    sin: Tensor


class HeadNorms(NamedTuple):
    """RMSNorm of each head, before its rotation: weights [D] of queries and of keys."""

    query: Tensor
    key: Tensor
    eps: float


class NewUnit(NamedTuple):
    """A layer's projections: query [B, H*G, 1, D], key and value [B, H, 1, D], any strides but 1 of
    the last dimension. Of a chunk of T tokens: T instead of 1."""

    query: Tensor
    key: Tensor
    value: Tensor


def store_rotated(
    new: NewUnit,
    tail_keys: Tensor,
    tail_values: Tensor,
    slot: Tensor,
    tables: Tables | None = None,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Write the rotated key and the value at a slot of the tail, and return the rotated query.

    Rotations are computed in float32 and rounded once.

    Args:
        new: all of one float dtype, which is also that of the tail and of the norms.
        tail_keys, tail_values: [B, H, C, D], the last dimension contiguous.
        slot: [1] int32, on the same device, in 0 .. C - 1: this cannot be checked without waiting
            for the device. A GPU stores nothing elsewhere.
        tables: None = nothing is rotated.
        norms: None = there are none.

    Returns:
        [B, H*G, 1, D], contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(new, tail_keys, tail_values, slot, tables, norms)
    if not takes_triton(*new, tail_keys, tail_values, slot):
        return store_rotated_reference(new, tail_keys, tail_values, slot, tables, norms)
    batch, query_heads, _, size = new.query.shape
    heads, capacity = tail_keys.shape[1:3]
    out = torch.empty(new.query.shape, dtype=new.query.dtype, device=new.query.device)
    if out.numel():
        with on_device(out):
            _store_rotated[(query_heads + heads, batch)](
                *(tuple(new), (tail_keys, tail_values), slot),
                *(tables and tuple(tables), norms and norms[:2], out),
                *(norms.eps if norms else 0.0, query_heads, capacity),
                *(tuple(x.stride() for x in new), (tail_keys.stride(), tail_values.stride())),
                0 if tables is None or tables.cos.shape[0] == 1 else tables.cos.stride(0),
                SIZE=size,
                ROTARY=0 if tables is None else tables.cos.shape[2],
                BLOCK=padded(size),
                num_warps=1,
            )
    return out


def store_rotated_reference(
    new: NewUnit,
    tail_keys: Tensor,
    tail_values: Tensor,
    slot: Tensor,
    tables: Tables | None,
    norms: HeadNorms | None,
) -> Tensor:
    """The twin of `store_rotated`, in plain PyTorch."""
    query, key, value = new
    if norms is not None:
        query = norm_reference(query, norms.query, norms.eps)
        key = norm_reference(key, norms.key, norms.eps)
    if tables is not None:
        cos, sin = (table.index_select(1, slot) for table in tables)
        query, key = (rotate_at_slots_reference(x, cos, sin, "half") for x in (query, key))
    store_units_reference(tail_keys, tail_values, key, value, slot)
    return query.contiguous()


def _check(
    new: NewUnit,
    tail_keys: Tensor,
    tail_values: Tensor,
    slot: Tensor,
    tables: Tables | None,
    norms: HeadNorms | None,
) -> None:
    batch, heads, capacity, size = tail_keys.shape
    dtype, unit = tail_keys.dtype, (batch, heads, 1, size)
    check_tensors(
        {
            "query": (new.query, dtype, (batch, new.query.shape[1], 1, size)),
            "key": (new.key, dtype, unit),
            "value": (new.value, dtype, unit),
            "tail_values": (tail_values, dtype, (batch, heads, capacity, size)),
            "slot": (slot, torch.int32, (1,)),
        },
        contiguous=False,
    )
    if norms is not None:
        weights = {"query norm": norms.query, "key norm": norms.key}
        check_tensors({name: (x, dtype, (size,)) for name, x in weights.items()})
    if any(x.stride(-1) != 1 for x in (*new, tail_keys, tail_values)):
        raise ValueError("channels are not contiguous; expected a stride of 1 in each tensor")
    if tables is not None:
        rows, slots, rotary = tables.cos.shape
        if rows not in (1, batch) or slots < capacity or rotary > size or rotary % 2:
            raise ValueError(
                f"cos is {tuple(tables.cos.shape)}; expected [1 or {batch}, {capacity} or more, "
                f"an even number up to {size}]"
            )
        check_tensors(
            {n: (x, x.dtype, tables.cos.shape) for n, x in tables._asdict().items()},
            contiguous=True,
        )


# Nothing is compiled anew for these, which differ from prompt to prompt.
@triton.jit(do_not_specialize=["capacity", "table_stride"])
def _store_rotated(  # type: ignore[no-untyped-def]
    new,
    tail,
    slot,
    tables,
    norms,
    out,
    eps,
    query_heads,
    capacity,
    new_strides,
    tail_strides,
    table_stride,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program has a query head, or a KV head: its key goes the same way, and its value with it.
    which = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    of_query = which < query_heads
    h = tl.where(of_query, which, which - query_heads).to(tl.int64)
    at = tl.load(slot).to(tl.int64)
    inside = (at >= 0) & (at < capacity)
    d = tl.arange(0, BLOCK)
    there = d < SIZE
    partner = tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
    turns = d < ROTARY

    query_at = units_at(new[0], new_strides[0], b, h, 0)
    x_at = tl.where(of_query, query_at, units_at(new[1], new_strides[1], b, h, 0))
    x = tl.load(x_at + d, mask=there, other=0.0).to(tl.float32)
    y = tl.load(x_at + partner, mask=turns, other=0.0).to(tl.float32)
    if norms is not None:
        weight = tl.where(of_query, norms[0], norms[1])
        shrink = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
        w = tl.load(weight + d, mask=there, other=0.0)
        x = _weighted(x * shrink, w)
        w = tl.load(weight + partner, mask=turns, other=0.0)
        y = _weighted(y * shrink, w)
    if tables is not None:
        in_table = b * table_stride + at * ROTARY + d
        cos = tl.load(tables[0] + in_table, mask=turns & inside, other=1.0).to(tl.float32)
        sin = tl.load(tables[1] + in_table, mask=turns & inside, other=0.0).to(tl.float32)
        x = x * cos + y * sin
    key_to = units_at(tail[0], tail_strides[0], b, h, at)
    query_to = out + (b * query_heads + h) * SIZE
    to = tl.where(of_query, query_to, key_to)
    tl.store(to + d, x.to(out.dtype.element_ty), mask=there & (of_query | inside))

    stored = there & inside & (which >= query_heads)
    value = tl.load(units_at(new[2], new_strides[2], b, h, 0) + d, mask=stored)
    tl.store(units_at(tail[1], tail_strides[1], b, h, at) + d, value, mask=stored)


@triton.jit
def _weighted(x, weight):  # type: ignore[no-untyped-def]
    """Normalised x, rounded as `norm_reference` does before and after its weight; float32."""
    rounded = x.to(weight.dtype).to(tl.float32)
    return (rounded * weight.to(tl.float32)).to(weight.dtype).to(tl.float32)
