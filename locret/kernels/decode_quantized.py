"""Attention of one or a few new tokens straight over packed keys and values.

As `decode.py`, with units of 8, 4 or 2 bits that are expanded in registers: what is read of them is
what they occupy. A split walks its units block by block, because a block is what shares entries of
the key tables. The units that are not packed, the residual, are further splits of the same merge.

Small queries are `decode_quantized_small.py`'s. For others, units are expanded to float16, for
bfloat16 models too: every packed value fits, and pairs of codes become pairs of values in a few
instructions.

KIVI (arXiv 2402.02750): keys per channel of a block of units, values per unit and group of
channels.
"""

import functools
import math

import torch
from torch import Tensor

from locret.kernels import decode_quantized_small as small
from locret.kernels.decode import attend_storage, check_decode, decode_attention_reference
from locret.kernels.dispatch import (
    INTERPRETED,
    multiprocessors,
    on_device,
    padded,
    takes_triton,
    tl,
    triton,
)
from locret.kernels.packed import (
    PackedKV,
    block_of,
    check_packed,
    expand_units_reference,
    of_head,
    power_of_two_in,
)
from locret.kernels.splits import (
    Splits,
    average,
    first_slot,
    log_sum,
    number_of_splits,
    queries_at,
    split_of,
    states_at,
    weigh,
)

_PROGRAMS = 3  # programs that share a multiprocessor
_REGISTERS = 168  # of a thread, so that _PROGRAMS of 128 threads fit
_TILE = 64  # most units that are expanded at a time
_START = 64  # units in whose time a program begins and ends


def decode_attention_quantized(
    query: Tensor,
    packed: PackedKV,
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
    if not out.numel():
        return out
    is_small = small.takes_small(query, packed)
    heads = keys.shape[0] * keys.shape[1]
    at_once = (small.PROGRAMS if is_small else _PROGRAMS) * multiprocessors(query.device)
    before = number_of_splits(heads, packed.count, at_once, _START) if packed.count else 0
    rest = number_of_splits(heads, keys.shape[2], at_once, _START)
    splits = Splits.empty(query, keys.shape[1], before + rest)
    if before:
        attend = small.attend_small if is_small else _attend_packed
        attend(query, packed, scaling, first, splits, before)
    attend_storage(query, keys, values, length, scaling, first, splits, before, packed.count)
    splits.merge(out)
    return out


def decode_attention_quantized_reference(
    query: Tensor,
    packed: PackedKV,
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


def expand_reference(packed: PackedKV, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values float32 [B, H, P, D = size] of packed units, in plain PyTorch."""
    how = (packed.bits, packed.group, size)
    return (
        expand_units_reference(packed.keys, *how, packed.starts),
        expand_units_reference(packed.values, *how),
    )


def _check(packed: PackedKV, keys: Tensor) -> None:
    how = (packed.bits, packed.group, (*keys.shape[:2], packed.count, keys.shape[3]))
    check_packed(packed.keys, *how, packed.starts, "key_")
    check_packed(packed.values, *how, None, "value_")
    for tensor in (*packed.keys, *packed.values):
        if tensor.stride(3) != 1:
            raise ValueError(
                f"packed units have strides {tensor.stride()}; expected the last of them to be 1"
            )


def _attend_packed(
    query: Tensor, packed: PackedKV, scaling: float, first: Tensor | None, out: Splits, count: int
) -> None:
    """Leave the attention over packed units in the first `count` splits of `out`."""
    batch, heads, units, nbytes = packed.keys[0].shape
    size, new = query.shape[3], query.shape[2]
    queries = query.shape[1] // heads * new
    byte_block = padded(nbytes, least=16)
    # Assembly is NVIDIA's; float32 queries are for precision.
    wide = query.dtype == torch.float32 or torch.version.hip is not None
    query_block = padded(queries, least=16)
    tensors = (*packed.keys, *packed.values)
    with on_device(query):
        _attend[(count, heads, batch)](
            *(query, tensors, packed.starts.contiguous()),
            *(None if first is None else first.contiguous(), (out.values, out.weights)),
            *(out.count, scaling * math.log2(math.e), units, packed.keys[1].shape[2]),
            *(query.stride(), tuple(tensor.stride()[:3] for tensor in tensors)),
            NEW=new,
            QUERIES=queries,
            SIZE=size,
            BITS=packed.bits,
            GROUP=packed.group,
            BYTES=nbytes,
            QUERY_BLOCK=query_block,
            BYTE_BLOCK=byte_block,
            SPAN=byte_block if packed.group >= size else power_of_two_in(nbytes, packed.group),
            UNITS=max(16, min(_TILE // 2 if wide else _TILE, padded(packed.group))),
            UPCAST=INTERPRETED or wide,
            ASSEMBLY=_assembly(packed.bits),
            num_warps=8 if wide else 4,
            maxnreg=None if wide or query_block > 16 else _REGISTERS,
        )


# Nothing is compiled anew for these, which differ from prompt to prompt.
@triton.jit(do_not_specialize=["all_splits", "count", "blocks"])
def _attend(  # type: ignore[no-untyped-def]
    query,
    tensors,
    starts,
    first,
    splits,
    all_splits,
    scaling,
    count,
    blocks,
    query_strides,
    strides,
    NEW: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BYTE_BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    UNITS: tl.constexpr,
    UPCAST: tl.constexpr,  # to float32 by plain arithmetic; the interpreter knows no other
    ASSEMBLY: tl.constexpr,
):
    PLANES: tl.constexpr = 8 // BITS
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    begin, stop = split_of(tl.minimum(first_slot(first, b, h, 0), count), count, 1)

    # The planes of a unit's channels are multiplied one by one.
    which = tl.arange(0, QUERY_BLOCK)
    byte = tl.arange(0, BYTE_BLOCK)
    in_bytes = byte < BYTES
    first_byte = tl.arange(0, BYTE_BLOCK // SPAN) * SPAN  # of the codes that share a table entry
    q_at = queries_at(query, query_strides, b, h, which, NEW, QUERIES)
    q_d = query_strides[3]
    queries = ()  # type: tuple
    summed = ()  # type: tuple
    for plane in tl.static_range(PLANES):
        channel = plane * BYTES + byte
        mask = (which < QUERIES)[:, None] & (in_bytes & (channel < SIZE))[None, :]
        q = tl.load(q_at + channel[None, :] * q_d, mask=mask, other=0.0).to(tl.float32)
        if not UPCAST:
            q = tl.clamp(q, -65504.0, 65504.0).to(tl.float16)
        queries += (q,)
        summed += (tl.zeros((QUERY_BLOCK, BYTE_BLOCK), tl.float32),)
    highest = tl.full((QUERY_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_BLOCK,), tl.float32)

    unit = tl.arange(0, UNITS)
    tensors = of_head(tensors, strides, b, h)
    key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum = tensors
    kc_s, vc_s = strides[0][2], strides[3][2]
    ends = starts + (b * tl.num_programs(1) + h) * (blocks + 1) + 1

    # A tile is the units at .. end - 1 of one block, UNITS of them at most; `after` is where the
    # next block ends. Everything a tile needs is asked for before any of it is used.
    block = tl.minimum(block_of(ends, begin, blocks), blocks - 1)
    at = begin
    end = tl.minimum(tl.load(ends + block), stop)
    while at < stop:
        after = tl.minimum(tl.load(ends + tl.minimum(block + 1, blocks - 1)), stop)
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
            at_scale = key_scale + block.to(tl.int64) * strides[1][2] + of_channel
            at_low = key_minimum + block.to(tl.int64) * strides[2][2] + of_channel
            k_tables += (tl.load(at_scale, mask=mask_1d, other=0.0),)
            k_tables += (tl.load(at_low, mask=mask_1d, other=0.0),)
            of_span = plane * BYTES + first_byte
            mask_2d = there[:, None] & ((first_byte < BYTES) & (of_span < SIZE))[None, :]
            group = (of_span // GROUP)[None, :]
            at_scales = value_scale + slot[:, None] * strides[4][2] + group
            at_lows = value_minimum + slot[:, None] * strides[5][2] + group
            v_tables += (tl.load(at_scales, mask=mask_2d, other=0.0),)
            v_tables += (tl.load(at_lows, mask=mask_2d, other=0.0),)

        logits = tl.zeros((QUERY_BLOCK, UNITS), tl.float32)
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
            v_scale = _spread(v_tables[2 * plane], SPAN)
            v_low = _spread(v_tables[2 * plane + 1], SPAN)
            v = _expanded(v_codes, v_scale, v_low, plane, BITS, UPCAST, ASSEMBLY)
            before = summed[plane] * shrink[:, None]
            grown += (tl.dot(weights, v, acc=before, input_precision="ieee"),)
        summed = grown

        is_done = at + UNITS >= end
        at = tl.minimum(at + UNITS, end)
        block = tl.minimum(tl.where(is_done, block + 1, block), blocks - 1)
        end = tl.where(is_done, after, end)

    at_state = states_at(b, h, 0, all_splits, which, QUERIES)
    tl.store(splits[1] + at_state, log_sum(highest, total), mask=which < QUERIES)
    for plane in tl.static_range(PLANES):
        channel = plane * BYTES + byte
        mask = (which < QUERIES)[:, None] & (in_bytes & (channel < SIZE))[None, :]
        at_values = splits[0] + at_state[:, None] * SIZE + channel[None, :]
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
def _spread(table, SPAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A table [N, spans], each entry repeated SPAN times; one span stays as it is."""
    N: tl.constexpr = table.shape[0]
    SPANS: tl.constexpr = table.shape[1]
    if SPANS > 1:
        table = tl.broadcast_to(table[:, :, None], (N, SPANS, SPAN))
        table = tl.reshape(table, (N, SPANS * SPAN))
    return table
