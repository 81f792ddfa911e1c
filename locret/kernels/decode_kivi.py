"""Attention of a few queries over units packed as KIVI packs them, expanded in registers.

KIVI (arXiv 2402.02750): keys per channel of a block of units, values per unit and group of
channels. What is read of units is what they occupy. A program walks its tile block by block,
because a block is what shares entries of the key tables.

Units are expanded to float16, for bfloat16 models too: every packed value fits, and pairs of codes
become pairs of values in a few instructions. Small queries are `decode_kivi_small.py`'s.
"""

import functools

from torch import Tensor

from locret.kernels.dispatch import head_of, on_device, padded, tl, triton
from locret.kernels.packed import (
    STEP,
    PackedKV,
    PackedShares,
    is_wide,
    launch_options,
    next_step,
    power_of_two_in,
    step_arguments,
)
from locret.kernels.splits import States, leave_average, leave_sum, queries_at, tile_at, weigh


def attend_packed(
    query: Tensor, packed: PackedKV, shares: PackedShares, scaling: float, states: States
) -> None:
    """Leave the attention over the tiles of packed units in the first of `states`."""
    nbytes, size = packed.keys[0].shape[1], query.shape[3]
    byte_block = padded(nbytes, least=16)
    arguments, sizes = step_arguments(query, packed, shares, scaling, states)
    with on_device(query):
        _attend[(shares.count,)](
            *arguments,
            **sizes,
            BITS=packed.bits,
            GROUP=packed.group,
            BYTE_BLOCK=byte_block,
            SPAN=byte_block if packed.group >= size else power_of_two_in(nbytes, packed.group),
            UNITS=max(16, min(STEP // (1 + is_wide(query)), padded(packed.group))),
            ASSEMBLY=_assembly(packed.bits),
            **launch_options(query, sizes["QUERIES"]),
        )


@triton.jit(do_not_specialize=["heads", "blocks"])
def _attend(  # type: ignore[no-untyped-def]
    query, tensors, where, states, scaling, heads, blocks, query_strides,
    NEW: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, QUERY_BLOCK: tl.constexpr, BYTE_BLOCK: tl.constexpr, SPAN: tl.constexpr,
    UNITS: tl.constexpr,
    UPCAST: tl.constexpr,  # to float32 by plain arithmetic; the interpreter knows no other
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = (SIZE * BITS + 7) // 8
    PLANES: tl.constexpr = 8 // BITS
    GROUPS: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    starts, tiles, tile_blocks = where
    tile = tl.program_id(0)
    sequence, at, stop = tile_at(tiles, tile)
    b, h = head_of(sequence, heads)

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
        q = tl.load(q_at[:, None] + channel[None, :] * q_d, mask=mask, other=0.0).to(tl.float32)
        if not UPCAST:
            q = tl.clamp(q, -65504.0, 65504.0).to(tl.float16)
        queries += (q,)
        summed += (tl.zeros((QUERY_BLOCK, BYTE_BLOCK), tl.float32),)
    highest = tl.full((QUERY_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_BLOCK,), tl.float32)

    unit = tl.arange(0, UNITS)
    key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum = tensors

    ends = starts + 1
    block = tl.load(tile_blocks + tile)
    end = tl.minimum(tl.load(ends + block), stop)
    while at < stop:
        after = tl.minimum(tl.load(ends + tl.minimum(block + 1, blocks - 1)), stop)
        there = at + unit < end
        slot = (at + unit).to(tl.int64)
        k_mask = in_bytes[:, None] & there[None, :]
        k_codes = tl.load(key_codes + byte[:, None] + slot[None, :] * BYTES, mask=k_mask, other=0)
        v_mask = there[:, None] & in_bytes[None, :]
        v_codes = tl.load(value_codes + slot[:, None] * BYTES + byte[None, :], mask=v_mask, other=0)
        k_tables = ()  # type: tuple
        v_tables = ()  # type: tuple
        for plane in tl.static_range(PLANES):
            of_channel = plane * BYTES + byte
            mask_1d = in_bytes & (of_channel < SIZE)
            at_scale = key_scale + block.to(tl.int64) * SIZE + of_channel
            at_low = key_minimum + block.to(tl.int64) * SIZE + of_channel
            k_tables += (tl.load(at_scale, mask=mask_1d, other=0.0),)
            k_tables += (tl.load(at_low, mask=mask_1d, other=0.0),)
            of_span = plane * BYTES + first_byte
            mask_2d = there[:, None] & ((first_byte < BYTES) & (of_span < SIZE))[None, :]
            group = (of_span // GROUP)[None, :]
            at_scales = value_scale + slot[:, None] * GROUPS + group
            at_lows = value_minimum + slot[:, None] * GROUPS + group
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

        at, end, block = next_step(at, end, after, block, blocks, UNITS)

    to = leave_sum(states[1], tile, which, highest, total, QUERIES)
    for plane in tl.static_range(PLANES):
        channel = plane * BYTES + byte
        there = in_bytes & (channel < SIZE)
        leave_average(states[0], to, which, channel, there, total, summed[plane], QUERIES, SIZE)


@triton.jit
def _expanded(  # type: ignore[no-untyped-def]
    packed, scale, minimum,
    plane: tl.constexpr, BITS: tl.constexpr, UPCAST: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
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
