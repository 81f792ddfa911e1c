"""Attention of one or a few new tokens straight over packed keys and values.

As `decode.py`, with units of 8, 4 or 2 bits that are expanded in registers: what is read of them is
what they occupy. A part walks its units run by run, because a run is what shares a row of the key
tables. The units that are not packed, the residual, are further parts of the same merge.

Few query rows are `few_rows.py`'s. For others, units are expanded to float16, for bfloat16 models
too: every packed value fits, and pairs of codes become pairs of values in a few instructions.

KIVI (arXiv 2402.02750): keys per channel of a run of units, values per unit and group of channels.
"""

import functools
import math

import torch
from torch import Tensor

from locret.kernels import few_rows
from locret.kernels.decode import check_decode, decode_attention_reference
from locret.kernels.dispatch import (
    INTERPRETED,
    multiprocessors,
    on_device,
    padded,
    takes_triton,
    tl,
    triton,
)
from locret.kernels.expand import expand_units_reference
from locret.kernels.few_rows import ANY_NUMBER, attend_few_rows, run_of, takes_few_rows
from locret.kernels.packed_units import PackedUnits
from locret.kernels.parts import Parts, average, log_sum, number_of_parts, weigh
from locret.kernels.storage_parts import attend_storage

_PROGRAMS = 3  # programs that share a multiprocessor
_REGISTERS = 168  # of a thread, so that _PROGRAMS of 128 threads fit
_TILE = 64  # most units that are expanded at a time


def decode_attention_quantized(
    query: Tensor,
    packed: PackedUnits,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scaling: float,
    first: Tensor | None = None,
) -> Tensor:
    """softmax(scaling q k) v over packed units and, after them, the slots filled of some storage.

    With T > 1 the tokens are the last of those slots, causal.

    Args:
        query: [B, H*G, T, D], rotated; G*T at most 128.
        packed: keys (rotated) and values of the first P slots, P >= 0.
        keys, values: [B, H, C, D], the residual: storage of the units that are not packed.
        length: [1] int32 on the same device: slots of the residual that are filled, the new
            tokens' included.
        scaling: factor of the logits.
        first: [B, H] int32, the first slot that a head attends to, packed ones counted; None = 0.

    Returns:
        [B, H*G, T, D] in query's dtype; zeros where a token sees no slot.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_decode(query, keys, values, length, first)
    _check(packed, keys)
    if not takes_triton(query):
        return decode_attention_quantized_reference(
            query, packed, keys, values, length, scaling, first
        )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel():
        _launch(query, packed, keys, values, length, scaling, first, out)
    return out


def decode_attention_quantized_reference(
    query: Tensor,
    packed: PackedUnits,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scaling: float,
    first: Tensor | None = None,
) -> Tensor:
    """The twin of `decode_attention_quantized`, in plain PyTorch."""
    packed_keys, packed_values = expand_reference(packed, query.shape[3])
    keys = torch.cat([packed_keys.to(keys.dtype), keys], dim=2)
    values = torch.cat([packed_values.to(values.dtype), values], dim=2)
    return decode_attention_reference(query, keys, values, length + packed.count, scaling, first)


def expand_reference(packed: PackedUnits, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values float32 [B, H, P, D = size] of packed units, in plain PyTorch."""
    how = (packed.bits, packed.group, size)
    return (
        expand_units_reference(
            packed.key_codes, packed.key_scale, packed.key_minimum, *how, packed.key_starts
        ),
        expand_units_reference(packed.value_codes, packed.value_scale, packed.value_minimum, *how),
    )


def _check(packed: PackedUnits, keys: Tensor) -> None:
    batch, heads, _, size = keys.shape
    if packed.bits not in (2, 4, 8):
        raise ValueError(f"bits is {packed.bits}; expected 2, 4 or 8")
    count, runs = packed.count, packed.key_scale.shape[2]
    codes = (torch.uint8, (batch, heads, count, -(-size * packed.bits // 8)))
    row = (torch.float16, (batch, heads, runs, size))
    table = (torch.float16, (batch, heads, count, -(-size // packed.group)))
    expected = {
        "key_codes": codes,
        "key_scale": row,
        "key_minimum": row,
        "key_starts": (torch.int32, (batch, heads, runs + 1)),
        "value_codes": codes,
        "value_scale": table,
        "value_minimum": table,
    }
    for name, (dtype, shape) in expected.items():
        tensor = getattr(packed, name)
        if tensor.dtype != dtype or tensor.shape != shape or (shape[3:] and tensor.stride(3) != 1):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} of strides {tensor.stride()}; "
                f"expected {dtype} {shape}, the last axis of stride 1"
            )


def _launch(
    query: Tensor,
    packed: PackedUnits,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scaling: float,
    first: Tensor | None,
    out: Tensor,
) -> None:
    heads_in_all = keys.shape[0] * keys.shape[1]
    few = takes_few_rows(query, packed)
    at_once = (few_rows.PROGRAMS if few else _PROGRAMS) * multiprocessors(query.device)
    of_packed = number_of_parts(heads_in_all, packed.count, at_once) if packed.count else 0
    rest = number_of_parts(heads_in_all, keys.shape[2], at_once)
    parts = Parts.empty(query, keys.shape[1], of_packed + rest)
    if of_packed:
        attend = attend_few_rows if few else _attend_packed
        attend(query, packed, scaling, first, parts, of_packed)
    attend_storage(
        query, keys, values, length, scaling, first, parts, of_packed, rest, packed.count
    )
    parts.merge(out)


def _attend_packed(
    query: Tensor,
    packed: PackedUnits,
    scaling: float,
    first: Tensor | None,
    parts: Parts,
    count: int,
) -> None:
    """Leave the attention over packed units in the first `count` parts of `parts`."""
    batch, heads, units, nbytes = packed.key_codes.shape
    size, new = query.shape[3], query.shape[2]
    rows = query.shape[1] // heads * new
    byte_block = padded(nbytes, least=16)
    # Assembly is NVIDIA's; float32 queries are for precision.
    wide = query.dtype == torch.float32 or torch.version.hip is not None
    row_block = padded(rows, least=16)
    with on_device(query):
        _attend[(count, heads, batch)](
            *(query, packed.key_codes, packed.key_scale, packed.key_minimum, packed.key_starts),
            *(packed.value_codes, packed.value_scale, packed.value_minimum),
            *(packed.key_starts if first is None else first, parts.values, parts.weights),
            *(parts.count, scaling * math.log2(math.e), units, packed.key_scale.shape[2]),
            *query.stride(),
            *packed.key_codes.stride()[:3],
            *packed.key_scale.stride()[:3],
            *packed.key_minimum.stride()[:3],
            *packed.key_starts.stride(),
            *packed.value_codes.stride()[:3],
            *packed.value_scale.stride()[:3],
            *packed.value_minimum.stride()[:3],
            *((0, 0) if first is None else first.stride()),
            HAS_FIRST=first is not None,
            NEW=new,
            ROWS=rows,
            SIZE=size,
            BITS=packed.bits,
            GROUP=packed.group,
            BYTES=nbytes,
            ROW_BLOCK=row_block,
            BYTE_BLOCK=byte_block,
            CHUNK=_chunk(nbytes, byte_block, size, packed.group),
            UNITS=max(16, min(_TILE // 2 if wide else _TILE, padded(packed.group))),
            UPCAST=INTERPRETED or wide,
            ASSEMBLY=_assembly(packed.bits),
            num_warps=8 if wide else 4,
            maxnreg=None if wide or row_block > 16 else _REGISTERS,
        )


def _chunk(nbytes: int, byte_block: int, size: int, group: int) -> int:
    """How many bytes that follow each other belong, plane by plane, to one group of channels."""
    if group >= size:
        return byte_block
    common = math.gcd(nbytes, group)
    return common & -common  # the largest power of two that divides it


@triton.jit(do_not_specialize=ANY_NUMBER)
def _attend(  # type: ignore[no-untyped-def]
    query,
    key_codes,
    key_scale,
    key_minimum,
    starts,
    value_codes,
    value_scale,
    value_minimum,
    first,
    part_values,
    part_weights,
    all_parts,
    scaling,
    count,
    runs,
    q_b,
    q_h,
    q_t,
    q_d,
    kc_b,
    kc_h,
    kc_s,
    ks_b,
    ks_h,
    ks_r,
    km_b,
    km_h,
    km_r,
    st_b,
    st_h,
    st_r,
    vc_b,
    vc_h,
    vc_s,
    vs_b,
    vs_h,
    vs_s,
    vm_b,
    vm_h,
    vm_s,
    first_b,
    first_h,
    HAS_FIRST: tl.constexpr,
    NEW: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    BYTE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    UNITS: tl.constexpr,
    UPCAST: tl.constexpr,  # to float32 by plain arithmetic; the interpreter knows no other
    ASSEMBLY: tl.constexpr,
):
    PLANES: tl.constexpr = 8 // BITS
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)

    begin = tl.full((), 0, tl.int32)
    if HAS_FIRST:
        begin = tl.minimum(tl.maximum(tl.load(first + b * first_b + h * first_h), 0), count)
    each = tl.cdiv(count - begin, parts)
    begin += part * each
    stop = tl.minimum(begin + each, count)

    # The planes of a unit's channels are multiplied one by one.
    row = tl.arange(0, ROW_BLOCK)
    byte = tl.arange(0, BYTE_BLOCK)
    in_bytes = byte < BYTES
    first_byte = tl.arange(0, BYTE_BLOCK // CHUNK) * CHUNK  # of the codes that share a table entry
    q_head = h * (ROWS // NEW) + row // NEW
    q_at = query + b * q_b + (q_head * q_h + (row % NEW) * q_t)[:, None]
    queries = ()  # type: tuple
    summed = ()  # type: tuple
    for plane in tl.static_range(PLANES):
        channel = plane * BYTES + byte
        mask = (row < ROWS)[:, None] & (in_bytes & (channel < SIZE))[None, :]
        q = tl.load(q_at + channel[None, :] * q_d, mask=mask, other=0.0).to(tl.float32)
        if not UPCAST:
            q = tl.clamp(q, -65504.0, 65504.0).to(tl.float16)
        queries += (q,)
        summed += (tl.zeros((ROW_BLOCK, BYTE_BLOCK), tl.float32),)
    highest = tl.full((ROW_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_BLOCK,), tl.float32)

    unit = tl.arange(0, UNITS)
    key_codes += b * kc_b + h * kc_h
    key_scale += b * ks_b + h * ks_h
    key_minimum += b * km_b + h * km_h
    ends = starts + b * st_b + h * st_h + st_r
    value_codes += b * vc_b + h * vc_h
    value_scale += b * vs_b + h * vs_h
    value_minimum += b * vm_b + h * vm_h

    # A tile is the units at .. end - 1 of one run, UNITS of them at most; `after` is where the next
    # run ends. Everything a tile needs is asked for before any of it is used.
    run = tl.minimum(run_of(ends, st_r, begin, runs), runs - 1)
    at = begin
    end = tl.minimum(tl.load(ends + run * st_r), stop)
    while at < stop:
        after = tl.minimum(tl.load(ends + tl.minimum(run + 1, runs - 1) * st_r), stop)
        there = at + unit < end
        slot = (at + unit).to(tl.int64)
        k_mask = in_bytes[:, None] & there[None, :]
        k_codes = tl.load(key_codes + byte[:, None] + slot[None, :] * kc_s, mask=k_mask, other=0)
        v_mask = there[:, None] & in_bytes[None, :]
        v_codes = tl.load(value_codes + slot[:, None] * vc_s + byte[None, :], mask=v_mask, other=0)
        k_tables = ()  # type: tuple
        v_tables = ()  # type: tuple
        for plane in tl.static_range(PLANES):
            of_channel = plane * BYTES + byte
            mask_1d = in_bytes & (of_channel < SIZE)
            at_scale = key_scale + run.to(tl.int64) * ks_r + of_channel
            at_low = key_minimum + run.to(tl.int64) * km_r + of_channel
            k_tables += (tl.load(at_scale, mask=mask_1d, other=0.0),)
            k_tables += (tl.load(at_low, mask=mask_1d, other=0.0),)
            of_chunk = plane * BYTES + first_byte
            mask_2d = there[:, None] & ((first_byte < BYTES) & (of_chunk < SIZE))[None, :]
            group = (of_chunk // GROUP)[None, :]
            at_scales = value_scale + slot[:, None] * vs_s + group
            at_lows = value_minimum + slot[:, None] * vm_s + group
            v_tables += (tl.load(at_scales, mask=mask_2d, other=0.0),)
            v_tables += (tl.load(at_lows, mask=mask_2d, other=0.0),)

        logits = tl.zeros((ROW_BLOCK, UNITS), tl.float32)
        for plane in tl.static_range(PLANES):
            k_scale = k_tables[2 * plane][:, None]
            k_low = k_tables[2 * plane + 1][:, None]
            k = _expanded(k_codes, k_scale, k_low, plane, BITS, UPCAST, ASSEMBLY)
            logits = tl.dot(queries[plane], k, acc=logits, input_precision="ieee")
        logits = tl.where(there[None, :], logits * scaling, float("-inf"))
        weights, shrink, highest, total = weigh(logits, highest, total)
        weights = weights.to(queries[0].dtype)
        grown = ()  # type: tuple
        for plane in tl.static_range(PLANES):
            v_scale = _spread(v_tables[2 * plane], CHUNK)
            v_low = _spread(v_tables[2 * plane + 1], CHUNK)
            v = _expanded(v_codes, v_scale, v_low, plane, BITS, UPCAST, ASSEMBLY)
            before = summed[plane] * shrink[:, None]
            grown += (tl.dot(weights, v, acc=before, input_precision="ieee"),)
        summed = grown

        is_done = at + UNITS >= end
        at = tl.minimum(at + UNITS, end)
        run = tl.minimum(tl.where(is_done, run + 1, run), runs - 1)
        end = tl.where(is_done, after, end)

    at_row = ((b * tl.num_programs(1) + h) * all_parts + part) * ROWS + row
    tl.store(part_weights + at_row, log_sum(highest, total), mask=row < ROWS)
    for plane in tl.static_range(PLANES):
        channel = plane * BYTES + byte
        mask = (row < ROWS)[:, None] & (in_bytes & (channel < SIZE))[None, :]
        at_values = part_values + at_row[:, None] * SIZE + channel[None, :]
        tl.store(at_values, average(summed[plane], total), mask=mask)


@triton.jit
def _expanded(  # type: ignore[no-untyped-def]
    packed,
    scale,
    minimum,
    plane: tl.constexpr,
    BITS: tl.constexpr,
    UPCAST: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """minimum + scale * code of one plane, for bytes `packed` and tables that broadcast."""
    if UPCAST:
        codes = (packed.to(tl.int32) >> (plane * BITS)) & ((1 << BITS) - 1)
        x = codes.to(tl.float32) * scale.to(tl.float32) + minimum.to(tl.float32)
    else:
        x = tl.inline_asm_elementwise(
            ASSEMBLY[plane],
            "=r,=r,r,r,r,r,r",
            [packed, scale, minimum],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    return x


@functools.cache
def _assembly(bits: int) -> tuple[str, ...]:
    """For each plane, PTX that makes four float16 values ($0, $1) of four bytes ($2), their scales
    ($3, $4) and minima ($5, $6).

    0x6400 is 1024 in float16 and its last bits count by one: set to a code, they make 1024 + code.
    """
    mask = (2**bits - 1) * 0x00010001
    return tuple(
        f"""{{
        .reg .b32 low, high, base;
        mov.b32 base, 0x64006400;
        prmt.b32 low, $2, 0, 0x4140;
        prmt.b32 high, $2, 0, 0x4342;
        shr.b32 low, low, {shift};
        shr.b32 high, high, {shift};
        lop3.b32 low, low, {mask:#010x}, base, 0xEA;
        lop3.b32 high, high, {mask:#010x}, base, 0xEA;
        sub.f16x2 low, low, base;
        sub.f16x2 high, high, base;
        fma.rn.f16x2 $0, low, $3, $5;
        fma.rn.f16x2 $1, high, $4, $6;
        }}"""
        for shift in range(0, 8, bits)
    )


@triton.jit
def _spread(table, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A table [N, chunks], each entry repeated CHUNK times; one chunk stays as it is."""
    N: tl.constexpr = table.shape[0]
    CHUNKS: tl.constexpr = table.shape[1]
    if CHUNKS > 1:
        table = tl.broadcast_to(table[:, :, None], (N, CHUNKS, CHUNK))
        table = tl.reshape(table, (N, CHUNKS * CHUNK))
    return table
