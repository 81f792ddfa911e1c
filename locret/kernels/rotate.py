"""Rotate queries or keys at their slots in one pass, and store new units in tails.

Any rotary embedding whose rotation turns pairs of dimensions fits: the caller gives the tables of
its slots. cos and sin are read once for several heads.

Of a step, key and value are stored in one launch at a slot that is read on the device: as they are
(`store_units`), or with query and key rotated by tables that are looked up there, after the norms
of queries and keys where an architecture has them (`store_rotated`).
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from locret.kernels.dense import HeadNorms, norm_reference
from locret.kernels.dispatch import (
    check_tensors,
    early,
    on_device,
    padded,
    start_next,
    takes_triton,
    tl,
    triton,
    units_at,
    wait_for_last,
)
from locret.kernels.packed import hadamard
from locret.kernels.rotated_levels import turned

Pairing = Literal["half", "interleaved"]


def rotate_at_slots(
    x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing = "half", out: Tensor | None = None
) -> Tensor:
    """out[d] = x[d] cos[d] + x[partner(d)] sin[d] for d < R; the other dimensions are copied.
    Computed in float32 and rounded once.

    Args:
        x: [B, H, S, D], any float dtype, any strides.
        cos: [B or 1, S, R], R even and at most D.
        sin: likewise; it carries the sign, that is, sin[d] is negative where x[partner(d)] is to
            be subtracted.
        pairing: the partner of d is `half`: d + R/2 or d - R/2, as in Llama; `interleaved`: the
            other of (0, 1), (2, 3), ..., as in GPT-J and GLM.
        out: where to write, [B, H, S, D] of x's dtype; may be x itself. None = a new tensor.

    Returns:
        [B, H, S, D] in x's dtype.
    """
    batch, _, slots, size = x.shape
    _check_tables(cos, sin, size, (batch, slots), pairing)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not takes_triton(x, cos, sin, out):
        return out.copy_(rotate_at_slots_reference(x, cos, sin, pairing))
    if x.numel():
        _launch(x, cos, sin, None, pairing == "half", out)
    return out


def rotate_at_slots_reference(x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing) -> Tensor:
    size = cos.shape[-1]
    turned, rest = x[..., :size].float(), x[..., size:]
    if pairing == "half":
        partner = turned.roll(size // 2, dims=-1)
    else:
        partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = turned * cos.float()[:, None] + partner * sin.float()[:, None]
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def rotate_units(
    x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, pairing: Pairing = "half"
) -> Tensor:
    """Flat units rotated at slots of their own, as by `rotate_at_slots`: [N, D] in x's dtype.

    Args:
        x: [N, D], any float dtype, any strides.
        cos, sin: [S, R], the tables of all slots, R even and at most D.
        slots: int32 or int64 [N], each in 0 .. S - 1. Not checked on a GPU.
        pairing: the partner of a dimension.
    """
    if x.dim() != 2 or slots.shape != x.shape[:1] or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"x is {tuple(x.shape)} and slots {tuple(slots.shape)} {slots.dtype}; "
            "expected [N, D] and [N] of int32 or int64"
        )
    _check_tables(cos[None], sin[None], x.shape[1], (1, None), pairing)
    if not takes_triton(x, cos, sin, slots):
        return rotate_units_reference(x, cos, sin, slots, pairing)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        tables = cos[None], sin[None], slots.contiguous()
        _launch(x[None, None], *tables, pairing == "half", out[None, None])
    return out


def rotate_units_reference(
    x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, pairing: Pairing
) -> Tensor:
    cos, sin = (table.index_select(0, slots)[None] for table in (cos, sin))
    return rotate_at_slots_reference(x[None, None], cos, sin, pairing)[0, 0]


def _check_tables(
    cos: Tensor, sin: Tensor, size: int, expected: tuple[int, int | None], pairing: str
) -> None:
    """Refuse tables that are not [rows or 1, slots, R] for units of this size; slots None = any."""
    rows, slots = expected
    if pairing not in get_args(Pairing):
        raise ValueError(f"pairing is {pairing!r}; expected one of {get_args(Pairing)}")
    fits = cos.dim() == 3 and cos.shape[0] in (1, rows) and slots in (None, cos.shape[1])
    if not fits or cos.shape[2] > size or cos.shape[2] % 2 or sin.shape != cos.shape:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit units of {size}: "
            f"expected [{rows} or 1, {'any' if slots is None else slots}, an even number up to "
            f"{size}]"
        )


def _launch(
    x: Tensor, cos: Tensor, sin: Tensor, table_slots: Tensor | None, half: bool, out: Tensor
) -> None:
    """`table_slots` [S] says where in the tables the slots of x are; None = in order."""
    batch, heads, slots, size = x.shape
    rotary = cos.shape[2]
    pairs = padded(rotary // 2)
    at_once = 1 if slots == 1 else max(1, 1024 // pairs)
    together = next(count for count in (8, 4, 3, 2, 1) if heads % count == 0)
    grid = (triton.cdiv(slots, at_once), heads // together, batch)
    rows_apart = 0 if cos.shape[0] == 1 else cos.shape[1]  # all rows may share one table
    with on_device(x):
        _rotate[grid](
            *(x, cos.contiguous(), sin.contiguous(), table_slots, out, slots, rows_apart),
            *(x.stride(), out.stride()),
            ROTARY=rotary,
            REST=size - rotary,
            PAIRS=pairs,
            REST_BLOCK=padded(size - rotary),
            SLOTS=at_once,
            HEADS=together,
            HALF=half,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["slots", "rows_apart"])
def _rotate(  # type: ignore[no-untyped-def]
    x, cos, sin, table_slots, out, slots, rows_apart, x_strides, out_strides,
    ROTARY: tl.constexpr, REST: tl.constexpr, PAIRS: tl.constexpr, REST_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * HEADS
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)[:, None]
    x = units_at(x, x_strides, batch, head, slot)
    out = units_at(out, out_strides, batch, head, slot)
    there = slot < slots
    in_table = slot
    if table_slots is not None:
        in_table = tl.load(table_slots + slot, mask=there, other=0).to(tl.int64)
    cos += (batch * rows_apart + in_table) * ROTARY
    sin += (batch * rows_apart + in_table) * ROTARY
    x_h, x_d = x_strides[1], x_strides[3]
    out_h, out_d = out_strides[1], out_strides[3]
    if ROTARY > 0:
        if HALF:
            d = tl.arange(0, PAIRS)[None, :]
            mask = there & (d < ROTARY // 2)
            other = d + ROTARY // 2
            cos_1 = tl.load(cos + d, mask=mask).to(tl.float32)
            cos_2 = tl.load(cos + other, mask=mask).to(tl.float32)
            sin_1 = tl.load(sin + d, mask=mask).to(tl.float32)
            sin_2 = tl.load(sin + other, mask=mask).to(tl.float32)
            for h in tl.static_range(HEADS):
                x_1 = tl.load(x + h * x_h + d * x_d, mask=mask).to(tl.float32)
                x_2 = tl.load(x + h * x_h + other * x_d, mask=mask).to(tl.float32)
                turned_1 = (x_1 * cos_1 + x_2 * sin_1).to(out.dtype.element_ty)
                turned_2 = (x_2 * cos_2 + x_1 * sin_2).to(out.dtype.element_ty)
                tl.store(out + h * out_h + d * out_d, turned_1, mask=mask)
                tl.store(out + h * out_h + other * out_d, turned_2, mask=mask)
        else:
            d = tl.arange(0, 2 * PAIRS)[None, :]
            mask = there & (d < ROTARY)
            cos_1, cos_2 = _pairs(tl.load(cos + d, mask=mask).to(tl.float32))
            sin_1, sin_2 = _pairs(tl.load(sin + d, mask=mask).to(tl.float32))
            for h in tl.static_range(HEADS):
                x_1, x_2 = _pairs(tl.load(x + h * x_h + d * x_d, mask=mask).to(tl.float32))
                turned = tl.interleave(x_1 * cos_1 + x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2)
                tl.store(out + h * out_h + d * out_d, turned.to(out.dtype.element_ty), mask=mask)
    if REST > 0:
        d = tl.arange(0, REST_BLOCK)[None, :]
        mask = there & (d < REST)
        for h in tl.static_range(HEADS):
            rest = tl.load(x + h * x_h + (ROTARY + d) * x_d, mask=mask)
            tl.store(out + h * out_h + (ROTARY + d) * out_d, rest, mask=mask)


@triton.jit
def _pairs(block):  # type: ignore[no-untyped-def]
    """[SLOTS, 2 N] -> the even and the odd elements, [SLOTS, N] each."""
    return tl.split(tl.reshape(block, (block.shape[0], block.shape[1] // 2, 2)))


def store_units(
    storage_keys: Tensor, storage_values: Tensor, key: Tensor, value: Tensor, slot: Tensor
) -> None:
    """Write T new units at the slots slot .. slot + T - 1, in place, in one launch.

    Args:
        storage_keys, storage_values: [B, H, C, D], any strides.
        key, value: [B, H, T, D], of the storage's dtypes; T is small, 1 while decoding.
        slot: [1] int32 or int64, on the same device. All slots must lie in the storage: this
            cannot be checked without waiting for the device. A GPU drops what lies outside.
    """
    _check_store(storage_keys, storage_values, key, value, slot)
    if not takes_triton(storage_keys, storage_values, key, value, slot):
        store_units_reference(storage_keys, storage_values, key, value, slot)
    elif key.numel():
        batch, heads, new, size = key.shape
        with on_device(key):
            _store[(new, heads, batch)](
                *((storage_keys, storage_values), (key, value), slot, storage_keys.shape[2]),
                (storage_keys.stride(), storage_values.stride()),
                (key.stride(), value.stride()),
                SIZES=(size, value.shape[3]),
                BLOCK=padded(max(size, value.shape[3])),
                num_warps=1,
            )


def store_units_reference(
    storage_keys: Tensor, storage_values: Tensor, key: Tensor, value: Tensor, slot: Tensor
) -> None:
    slots = slot.long() + torch.arange(key.shape[2], device=slot.device)
    storage_keys.index_copy_(2, slots, key)
    storage_values.index_copy_(2, slots, value)


def _check_store(
    storage_keys: Tensor, storage_values: Tensor, key: Tensor, value: Tensor, slot: Tensor
) -> None:
    for name, units, storage in (("key", key, storage_keys), ("value", value, storage_values)):
        shape = (*storage.shape[:2], key.shape[2], *storage.shape[3:])
        check_tensors({name: (units, storage.dtype, shape)}, contiguous=False)
    if slot.shape != (1,) or slot.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slot is {tuple(slot.shape)} {slot.dtype}; expected [1], int32 or int64")


@triton.jit(do_not_specialize=["capacity"])
def _store(  # type: ignore[no-untyped-def]
    storage, new, slot, capacity, storage_strides, new_strides,
    SIZES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK)
    at = tl.load(slot).to(tl.int64) + t + 0 * d
    inside = (at >= 0) & (at < capacity)
    units = ()  # type: tuple
    for i in tl.static_range(len(new)):
        strides = new_strides[i]
        of_unit = units_at(new[i], strides, b, h, t) + d * strides[3]
        units += (tl.load(of_unit, mask=d < SIZES[i]),)
    for i in tl.static_range(len(new)):
        strides = storage_strides[i]
        to = units_at(storage[i], strides, b, h, at) + d * strides[3]
        tl.store(to, units[i], mask=inside & (d < SIZES[i]))


class Tables(NamedTuple):
    """cos and sin [1 or B, C, R] of the tail's slots, as `rotate_at_slots` takes them, its partners
    being R / 2 apart ("half")."""

    cos: Tensor
    sin: Tensor


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
    turned_query: Tensor | None = None,
) -> Tensor:
    """Write the rotated key and the value at a slot of the tail, and return the rotated query.
    Rotations are computed in float32 and rounded once.

    Args:
        new: all of one float dtype, which is also that of the tail and of the norms.
        tail_keys, tail_values: [B, H, C, D], the last dimension contiguous.
        slot: [1] int32, on the same device, in 0 .. C - 1: this cannot be checked without waiting
            for the device. A GPU stores nothing elsewhere.
        tables, norms: None = nothing is rotated; there are no norms.
        turned_query: float32 [B, H*G, 1, D], contiguous, to be filled with H q of the query that is
            returned, as `decode_packed` takes it; D a multiple of 8.

    Returns:
        [B, H*G, 1, D], contiguous.
    """
    _check_new(new, tail_keys, tail_values, slot, tables, norms)
    check_tensors({"turned_query": (turned_query, torch.float32, tuple(new.query.shape))})
    if not takes_triton(*new, tail_keys, tail_values, slot, turned_query):
        query = store_rotated_reference(new, tail_keys, tail_values, slot, tables, norms)
        if turned_query is not None:
            torch.matmul(query.float(), hadamard(query.shape[3], query.device), out=turned_query)
        return query
    batch, query_heads, _, size = new.query.shape
    heads, capacity = tail_keys.shape[1:3]
    out = torch.empty(new.query.shape, dtype=new.query.dtype, device=new.query.device)
    if out.numel():
        with on_device(out):
            _store_rotated[(query_heads + heads, batch)](
                *(tuple(new), (tail_keys, tail_values), slot),
                *(tables and tuple(tables), norms and norms[:2], (out, turned_query)),
                *(norms.eps if norms else 0.0, query_heads, capacity),
                *(tuple(x.stride() for x in new), (tail_keys.stride(), tail_values.stride())),
                0 if tables is None or tables.cos.shape[0] == 1 else tables.cos.stride(0),
                SIZE=size,
                ROTARY=0 if tables is None else tables.cos.shape[2],
                BLOCK=padded(size, least=16),
                num_warps=1 if turned_query is None else 4,
                **early(out),
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
    query, key, value = new
    if norms is not None:
        query = norm_reference(query, norms.query, norms.eps)
        key = norm_reference(key, norms.key, norms.eps)
    if tables is not None:
        cos, sin = (table.index_select(1, slot) for table in tables)
        query, key = (rotate_at_slots_reference(x, cos, sin, "half") for x in (query, key))
    store_units_reference(tail_keys, tail_values, key, value, slot)
    return query.contiguous()


def _check_new(
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
        check_tensors({f"{n} norm": (getattr(norms, n), dtype, (size,)) for n in ("query", "key")})
    if any(x.stride(-1) != 1 for x in (*new, tail_keys, tail_values)):
        raise ValueError("channels are not contiguous; expected a stride of 1 in each tensor")
    if tables is not None:
        rows, slots, rotary = tables.cos.shape
        if rows not in (1, batch) or slots < capacity or rotary > size or rotary % 2:
            raise ValueError(
                f"cos is {tuple(tables.cos.shape)}; expected [1 or {batch}, {capacity} or more, "
                f"an even number up to {size}]"
            )
        check_tensors({n: (x, x.dtype, tables.cos.shape) for n, x in tables._asdict().items()})


@triton.jit(do_not_specialize=["capacity", "table_stride"])
def _store_rotated(  # type: ignore[no-untyped-def]
    new, tail, slot, tables, norms, out, eps, query_heads, capacity, new_strides, tail_strides,
    table_stride,
    SIZE: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start_next(EARLY)
    wait_for_last(EARLY)
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
    query_to = (b * query_heads + h) * SIZE
    to = tl.where(of_query, out[0] + query_to, key_to)
    x = x.to(out[0].dtype.element_ty)
    tl.store(to + d, x, mask=there & (of_query | inside))
    if out[1] is not None:
        y = turned(x.to(tl.float32), SIZE, BLOCK)
        tl.store(out[1] + query_to + d, y, mask=there & of_query)

    stored = there & inside & (which >= query_heads)
    value = tl.load(units_at(new[2], new_strides[2], b, h, 0) + d, mask=stored)
    tl.store(units_at(tail[1], tail_strides[1], b, h, at) + d, value, mask=stored)


@triton.jit
def _weighted(x, weight):  # type: ignore[no-untyped-def]
    """Normalised x, rounded as `norm_reference` does before and after its weight; float32."""
    rounded = x.to(weight.dtype).to(tl.float32)
    return (rounded * weight.to(tl.float32)).to(weight.dtype).to(tl.float32)
