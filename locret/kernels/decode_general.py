"""Attention of any number of queries over packed units, of all schemes whose units kernels attend
to as they are; and what the kernels for small queries (`decode_kivi`, `decode_rotated`) share with
it.

What is read of units is what they occupy. A program walks its tile block by block, because a block
is what shares entries of the key tables. Units become operands in registers:

- KIVI: minimum + scale * code, in float16 for bfloat16 models too: every packed value fits, and
  pairs of codes become pairs of values in a few instructions.
- `rotated`: levels, no unit rotated back. q . k = H q . (scale * level) + q . mean, and the sum of
  w v is H (sum of w * scale * level). So a query is rotated once, before, and the averages once, in
  the merge. The scales of keys go into the logits, those of values into the weights.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locret.kernels.dispatch import (
    INTERPRETED,
    early,
    head_of,
    on_device,
    padded,
    start_next,
    tl,
    triton,
    wait_for_last,
)
from locret.kernels.packed import Packed, PackedKV, RotatedKV, blocks_at, is_wide
from locret.kernels.rotated_levels import bits_of, chunk_assembly, chunks_of, levels_at, load_codes
from locret.kernels.splits import (
    Shares,
    States,
    leave_average,
    leave_sum,
    queries_at,
    tile_at,
    weigh,
)

STEP = 64  # most units of a block that kernels take at a time
PROGRAMS = 3  # programs that share a multiprocessor
_REGISTERS = 168  # of a thread, so that PROGRAMS of 128 threads fit


@dataclass(frozen=True)
class PackedShares(Shares):
    """Which program attends to which packed units.

    Attributes:
        blocks: int32 [P] on the device: the block that each tile's first unit is in.
    """

    blocks: Tensor

    @classmethod
    def along(cls, starts: Tensor, shares: Shares) -> "PackedShares":
        """`shares` of units in blocks that begin at `starts`, int32 [G + 1].

        A program takes its units in steps, which end with a block. So the borders of tiles move,
        by at most half a step, to where a step ends: else both neighbours had a step of few units.
        """
        border = shares.tiles[:, 1:].contiguous()
        block = blocks_at(starts, border)
        start, stop = starts[block], starts[block + 1]
        before = border - (border - start) % STEP
        after = torch.minimum(before + STEP, stop)
        moved = torch.where(border - before < after - border, before, after)
        tiles = torch.cat([shares.tiles[:, :1], moved], 1)
        blocks = blocks_at(starts, moved[:, 0].contiguous()).int()
        return cls(tiles, shares.firsts, shares.lengths, blocks)


def step_arguments(
    query: Tensor, packed: Packed, shares: PackedShares, scaling: float, states: States
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a kernel that leaves the attention over packed units in `states` takes: by order, after
    the queries, and by name."""
    heads = len(shares.lengths) // len(query)
    tensors = (*packed.keys, *packed.values), (packed.starts, shares.tiles, shares.blocks)
    numbers = scaling * math.log2(math.e), heads, len(packed.starts) - 1, query.stride()
    sizes = {"NEW": query.shape[2], "QUERIES": states.weights.shape[1], "SIZE": query.shape[3]}
    return (*tensors, (states.values, states.weights), *numbers), sizes


def power_of_two_in(*numbers: int) -> int:
    """The largest power of two that divides all `numbers`."""
    common = math.gcd(*numbers)
    return common & -common


def attend_packed(
    query: Tensor,
    rotated: Tensor | None,
    packed: PackedKV | RotatedKV,
    shares: PackedShares,
    scaling: float,
    states: States,
) -> None:
    """Leave the attention over the tiles of packed units in the first of `states`.

    Args:
        rotated: of the scheme `rotated`, the query rotated (`decode_rotated.rotate_queries`); its
            states are rotated, too.
    """
    arguments, sizes = step_arguments(query, packed, shares, scaling, states)
    size, block = query.shape[3], padded(sizes["QUERIES"], least=16)
    wide = is_wide(query)
    upcast = INTERPRETED or wide
    how = size, wide, upcast
    operands = _levels(packed, *how) if isinstance(packed, RotatedKV) else _values(packed, *how)
    with on_device(query):
        _attend[(shares.count,)](
            *((query, rotated), *arguments),
            **sizes,
            **operands,
            SIZE_BLOCK=padded(size, least=16),
            QUERY_BLOCK=block,
            UPCAST=upcast,
            num_warps=8 if wide else 4,
            maxnreg=None if wide or block > 16 else _REGISTERS,
            **({"EARLY": False} if rotated is None else early(query)),
        )


def _values(packed: PackedKV, size: int, wide: bool, upcast: bool) -> dict[str, Any]:
    """How KIVI's units become operands, by the names of `_attend`."""
    nbytes, assembly = packed.keys[0].shape[1], None if upcast else _assembly(packed.bits)
    byte_block = padded(nbytes, least=16)
    return {
        "GROUP": packed.group,
        "SPAN": byte_block if packed.group >= size else power_of_two_in(nbytes, packed.group),
        "KEY_BITS": packed.bits,
        "VALUE_BITS": packed.bits,
        "KEY_LEVELS": (),
        "VALUE_LEVELS": (),
        "KEY_BLOCK": byte_block,
        "VALUE_BLOCK": byte_block,
        "KEY_ASSEMBLY": assembly,
        "VALUE_ASSEMBLY": assembly,
        "UNITS": max(16, min(STEP // (1 + wide), padded(packed.group))),
    }


def _levels(packed: RotatedKV, size: int, wide: bool, upcast: bool) -> dict[str, Any]:
    """How units of `rotated` become operands."""
    keys, values = packed.key_levels, packed.value_levels
    key_bits, value_bits = bits_of(keys), bits_of(values)
    return {
        "GROUP": 0,
        "SPAN": 0,
        "KEY_BITS": key_bits,
        "VALUE_BITS": value_bits,
        "KEY_LEVELS": keys if key_bits < 8 else (),
        "VALUE_LEVELS": values if value_bits < 8 else (),
        "KEY_BLOCK": padded(size // chunks_of(key_bits), least=16),
        "VALUE_BLOCK": padded(size // chunks_of(value_bits), least=32),  # wider than a query block
        "KEY_ASSEMBLY": None if upcast else chunk_assembly(keys),
        "VALUE_ASSEMBLY": None if upcast else chunk_assembly(values),
        "UNITS": max(16, min(STEP // (4 if wide else 1), padded(packed.group))),
    }


@triton.jit(do_not_specialize=["heads", "blocks"])
def _attend(  # type: ignore[no-untyped-def]
    queries, tensors, where, states, scaling, heads, blocks, query_strides,
    NEW: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # channels that share a scale of a value; 0 = units are rotated
    SPAN: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, UNITS: tl.constexpr,
    UPCAST: tl.constexpr,  # to float32 by plain arithmetic; the interpreter knows no other
    KEY_ASSEMBLY: tl.constexpr, VALUE_ASSEMBLY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start_next(EARLY)
    wait_for_last(EARLY)
    # Channels whose codes are in the same bits of their bytes, a chunk, are multiplied at once.
    KEY_CHUNKS: tl.constexpr = 8 // (KEY_BITS - KEY_BITS % 2)
    VALUE_CHUNKS: tl.constexpr = 8 // (VALUE_BITS - VALUE_BITS % 2)
    KEY_CHUNK: tl.constexpr = (SIZE + KEY_CHUNKS - 1) // KEY_CHUNKS
    VALUE_CHUNK: tl.constexpr = (SIZE + VALUE_CHUNKS - 1) // VALUE_CHUNKS
    starts, tiles, tile_blocks = where
    tile = tl.program_id(0)
    sequence, at, stop = tile_at(tiles, tile)
    b, h = head_of(sequence, heads)

    which = tl.arange(0, QUERY_BLOCK)
    some = (which < QUERIES)[:, None]
    k_byte = tl.arange(0, KEY_BLOCK)
    v_byte = tl.arange(0, VALUE_BLOCK)
    q_at = queries_at(queries[0], query_strides, b, h, which, NEW, QUERIES)
    q_d = query_strides[3]
    if GROUP == 0:
        # The query as it is, for the means; and rotated, to be multiplied with levels.
        d = tl.arange(0, SIZE_BLOCK)
        q_at = q_at[:, None] + d[None, :] * q_d
        plain = tl.load(q_at, mask=some & (d < SIZE)[None, :], other=0.0).to(tl.float32)
        q_at = queries[1] + (sequence * QUERIES + which) * SIZE
        q_d = 1
    chunks = ()  # type: tuple
    for chunk in tl.static_range(KEY_CHUNKS):
        channel = chunk * KEY_CHUNK + k_byte
        mask = some & ((k_byte < KEY_CHUNK) & (channel < SIZE))[None, :]
        q = tl.load(q_at[:, None] + channel[None, :] * q_d, mask=mask, other=0.0).to(tl.float32)
        if not UPCAST:
            q = tl.clamp(q, -65504.0, 65504.0).to(tl.float16)
        chunks += (q,)
    summed = ()  # type: tuple
    for _ in tl.static_range(VALUE_CHUNKS):
        summed += (tl.zeros((QUERY_BLOCK, VALUE_BLOCK), tl.float32),)
    highest = tl.full((QUERY_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_BLOCK,), tl.float32)

    unit = tl.arange(0, UNITS)
    ends = starts + 1
    block = tl.load(tile_blocks + tile)
    end = tl.minimum(tl.load(ends + block), stop)
    while at < stop:
        after = tl.minimum(tl.load(ends + tl.minimum(block + 1, blocks - 1)), stop)
        there = at + unit < end
        slot = (at + unit).to(tl.int64)
        entry = block.to(tl.int64) * SIZE
        k_mask = (k_byte < KEY_CHUNK)[:, None] & there[None, :]
        v_mask = there[:, None] & (v_byte < VALUE_CHUNK)[None, :]
        if GROUP == 0:
            key_codes, key_scale, key_mean, value_codes, value_scale = tensors
            k_at = key_codes + slot[None, :] * (SIZE * KEY_BITS // 8)
            k_codes = load_codes(k_at, k_byte[:, None], k_mask, KEY_BITS, KEY_CHUNK, KEY_ASSEMBLY)
            v_at = value_codes + slot[:, None] * (SIZE * VALUE_BITS // 8)
            v_codes = load_codes(
                v_at, v_byte[None, :], v_mask, VALUE_BITS, VALUE_CHUNK, VALUE_ASSEMBLY
            )
            k_scale = tl.load(key_scale + slot, mask=there, other=0.0).to(tl.float32)
            v_scale = tl.load(value_scale + slot, mask=there, other=0.0).to(tl.float32)
            mean = tl.load(key_mean + entry + d, mask=d < SIZE, other=0.0)
            offset = tl.sum(plain * mean.to(tl.float32)[None, :], 1)
        else:
            k_at = tensors[0] + k_byte[:, None] + slot[None, :] * KEY_CHUNK
            k_codes = tl.load(k_at, mask=k_mask, other=0)
            v_at = tensors[3] + slot[:, None] * VALUE_CHUNK + v_byte[None, :]
            v_codes = tl.load(v_at, mask=v_mask, other=0)
            k_tables = ()  # type: tuple
            v_tables = ()  # type: tuple
            for chunk in tl.static_range(KEY_CHUNKS):
                of_chunk = chunk * KEY_CHUNK + k_byte
                mask_1d = (k_byte < KEY_CHUNK) & (of_chunk < SIZE)
                # Channels of a span share an entry of a value's tables.
                spans = tl.arange(0, VALUE_BLOCK // SPAN) * SPAN
                of_span = chunk * VALUE_CHUNK + spans
                mask_2d = there[:, None] & ((spans < VALUE_CHUNK) & (of_span < SIZE))[None, :]
                group = (of_span // GROUP)[None, :]
                for table in tl.static_range(1, 3):
                    k_at = tensors[table] + entry + of_chunk
                    k_tables += (tl.load(k_at, mask=mask_1d, other=0.0),)
                for table in tl.static_range(4, 6):
                    v_at = tensors[table] + slot[:, None] * ((SIZE + GROUP - 1) // GROUP) + group
                    v_tables += (tl.load(v_at, mask=mask_2d, other=0.0),)

        logits = tl.zeros((QUERY_BLOCK, UNITS), tl.float32)
        for chunk in tl.static_range(KEY_CHUNKS):
            if GROUP == 0:
                k = levels_at(k_codes, chunk, KEY_BITS, KEY_LEVELS, KEY_ASSEMBLY)
            else:
                step = k_tables[2 * chunk][:, None]
                low = k_tables[2 * chunk + 1][:, None]
                k = _expanded(k_codes, step, low, chunk, KEY_BITS, UPCAST, KEY_ASSEMBLY)
            logits = tl.dot(chunks[chunk], k, acc=logits, input_precision="ieee")
        if GROUP == 0:
            logits = logits * k_scale[None, :] + offset[:, None]
        logits = tl.where(there[None, :], logits * scaling, float("-inf"))
        weights, shrink, highest, total = weigh(logits, highest, total)
        if GROUP == 0:
            # Relative to the largest scale here, so that float16 holds the weights of all units.
            largest = tl.max(v_scale, 0)
            weights *= (v_scale / tl.where(largest > 0.0, largest, 1.0))[None, :]
        weights = weights.to(chunks[0].dtype)
        grown = ()  # type: tuple
        for chunk in tl.static_range(VALUE_CHUNKS):
            before = summed[chunk] * shrink[:, None]
            if GROUP == 0:
                v = levels_at(v_codes, chunk, VALUE_BITS, VALUE_LEVELS, VALUE_ASSEMBLY)
                grown += (before + tl.dot(weights, v, input_precision="ieee") * largest,)
            else:
                step = _spread(v_tables[2 * chunk], SPAN)
                low = _spread(v_tables[2 * chunk + 1], SPAN)
                v = _expanded(v_codes, step, low, chunk, VALUE_BITS, UPCAST, VALUE_ASSEMBLY)
                grown += (tl.dot(weights, v, acc=before, input_precision="ieee"),)
        summed = grown

        at, end, block = next_step(at, end, after, block, blocks, UNITS)

    to = leave_sum(states[1], tile, which, highest, total, QUERIES)
    for chunk in tl.static_range(VALUE_CHUNKS):
        of_chunk = chunk * VALUE_CHUNK + v_byte
        there = (v_byte < VALUE_CHUNK) & (of_chunk < SIZE)
        leave_average(states[0], to, which, of_chunk, there, total, summed[chunk], QUERIES, SIZE)


@triton.jit
def next_step(at, end, after, block, blocks, UNITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a step after that at `at` begins, the end of its block, and the block.

    A step takes the units at .. end - 1 of one block, UNITS of them at most; `after` is where the
    next block ends. Everything that a step needs is asked for before any of it is used.
    """
    is_done = at + UNITS >= end
    block = tl.minimum(tl.where(is_done, block + 1, block), blocks - 1)
    return tl.minimum(at + UNITS, end), tl.where(is_done, after, end), block


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
