"""Attention of a few queries over units of the scheme `rotated`, without rotating a unit back.

    q . k = H q . (scale * level) + q . mean       sum of w v = H (sum of w * scale * level)

So a query is rotated once, before, and the averages once, in the merge. Levels are looked up in
registers and are operands of the products as they are; the scales of keys go into the logits, those
of values into the weights.
"""

import math

import torch
from torch import Tensor

from locret.kernels.dispatch import INTERPRETED, on_device, padded, tl, triton
from locret.kernels.packed import STEP, PackedShares
from locret.kernels.packed_rotated import (
    RotatedKV,
    assembly,
    bits_of,
    chunk_of,
    hadamard_at,
    levels_at,
    load_codes,
)
from locret.kernels.splits import (
    Shares,
    States,
    average,
    log_sum,
    queries_at,
    tile_at,
    weigh,
)

PROGRAMS = 3  # programs that share a multiprocessor
_REGISTERS = 168  # of a thread, so that PROGRAMS of 128 threads fit
_STATES = 32  # states that the merge reads at a time
_ROWS = 32  # elements of a vector that are rotated at a time


def attend_rotated(
    query: Tensor,
    packed: RotatedKV,
    shares: PackedShares,
    scaling: float,
    heads: int,
    states: States,
) -> None:
    """Leave the attention over the tiles of packed units, rotated, in the first of `states`."""
    size, new = query.shape[3], query.shape[2]
    queries = query.shape[1] // heads * new
    key_bits, value_bits = bits_of(packed.key_levels), bits_of(packed.value_levels)
    # Assembly is NVIDIA's; float32 queries are for precision.
    wide = query.dtype == torch.float32 or torch.version.hip is not None
    upcast = INTERPRETED or wide
    query_block = padded(queries, least=16)
    rotated = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    sizes = {"SIZE": size, "SIZE_BLOCK": padded(size, least=16)}
    with on_device(query):
        _rotate[(new * triton.cdiv(size, _ROWS), query.shape[1], query.shape[0])](
            *(query, rotated, query.stride()), ROOT=_root(size), ROWS=_ROWS, num_warps=4, **sizes
        )
        _attend[(shares.count,)](
            *(query, rotated, (*packed.keys, *packed.values), packed.starts),
            *(shares.tiles, shares.blocks, (states.values, states.weights)),
            *(scaling * math.log2(math.e), heads, len(packed.starts) - 1, query.stride()),
            NEW=new,
            QUERIES=queries,
            KEY_BITS=key_bits,
            VALUE_BITS=value_bits,
            KEY_LEVELS=packed.key_levels if key_bits < 8 else (),
            VALUE_LEVELS=packed.value_levels if value_bits < 8 else (),
            QUERY_BLOCK=query_block,
            KEY_BLOCK=padded(chunk_of(size, key_bits), least=16),
            VALUE_BLOCK=padded(chunk_of(size, value_bits), least=32),  # wider than a query block
            UNITS=max(16, min(STEP // 4 if wide else STEP, padded(packed.group))),
            UPCAST=upcast,
            KEY_ASSEMBLY=None if upcast else assembly(packed.key_levels),
            VALUE_ASSEMBLY=None if upcast else assembly(packed.value_levels),
            num_warps=8 if wide else 4,
            maxnreg=None if wide or query_block > 16 else _REGISTERS,
            **sizes,
        )


def merge_rotated(states: States, out: Tensor, shares: Shares, others: Shares) -> None:
    """Write the attention of all states together to `out` [B, H*G, T, D], the averages of the tiles
    of `shares` rotated back; those of `others` and of the tails are not rotated."""
    queries, size = states.values.shape[1:]
    batch, q_heads, new, _ = out.shape
    with on_device(out):
        _merge[(queries, q_heads * new // queries, batch)](
            *(states.values, states.weights, out, shares.firsts, others.firsts),
            *(shares.count, shares.count + others.count, states.tail_splits, out.stride()),
            NEW=new,
            QUERIES=queries,
            SIZE=size,
            SIZE_BLOCK=padded(size, least=16),
            ROOT=_root(size),
            ROWS=_ROWS,
            STEP=_STATES,
            num_warps=8,
        )


def _root(size: int) -> float:
    """What the signs of a Hadamard matrix are multiplied by."""
    return float((size & -size) ** -0.5)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    query,
    rotated,
    strides,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    ROOT: tl.constexpr,
    ROWS: tl.constexpr,
):
    SLICES: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    t = tl.program_id(0) // SLICES
    head = tl.program_id(1)
    b = tl.program_id(2)
    i = tl.program_id(0) % SLICES * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, SIZE_BLOCK)
    at = query + b.to(tl.int64) * strides[0] + head * strides[1] + t * strides[2] + d * strides[3]
    q = tl.load(at, mask=d < SIZE, other=0.0).to(tl.float32)
    x = tl.sum(hadamard_at(i[:, None], d[None, :], SIZE) * q[None, :], 1) * ROOT
    row = (b * tl.num_programs(1) + head) * (tl.num_programs(0) // SLICES) + t
    tl.store(rotated + row * SIZE + i, x, mask=i < SIZE)


# Nothing is compiled anew for these, which differ from prompt to prompt.
@triton.jit(do_not_specialize=["heads", "blocks"])
def _attend(  # type: ignore[no-untyped-def]
    query,
    rotated,
    tensors,
    starts,
    tiles,
    tile_blocks,
    states,
    scaling,
    heads,
    blocks,
    query_strides,
    NEW: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_LEVELS: tl.constexpr,
    VALUE_LEVELS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
    UPCAST: tl.constexpr,  # to float32 by plain arithmetic; the interpreter knows no other
    KEY_ASSEMBLY: tl.constexpr,
    VALUE_ASSEMBLY: tl.constexpr,
):
    KEY_CHUNKS: tl.constexpr = 8 // (KEY_BITS - KEY_BITS % 2)
    VALUE_CHUNKS: tl.constexpr = 8 // (VALUE_BITS - VALUE_BITS % 2)
    KEY_CHUNK: tl.constexpr = SIZE // KEY_CHUNKS
    VALUE_CHUNK: tl.constexpr = SIZE // VALUE_CHUNKS
    tile = tl.program_id(0)
    sequence, at, stop = tile_at(tiles, tile)
    h = (sequence % heads).to(tl.int64)
    b = (sequence // heads).to(tl.int64)

    # The query as it is, for the means, and rotated, in the chunks that keys are multiplied in.
    which = tl.arange(0, QUERY_BLOCK)
    some = (which < QUERIES)[:, None]
    d = tl.arange(0, SIZE_BLOCK)
    k_byte = tl.arange(0, KEY_BLOCK)
    v_byte = tl.arange(0, VALUE_BLOCK)
    q_at = queries_at(query, query_strides, b, h, which, NEW, QUERIES)
    q_at += d[None, :] * query_strides[3]
    plain = tl.load(q_at, mask=some & (d < SIZE)[None, :], other=0.0).to(tl.float32)
    q_at = rotated + (sequence * QUERIES + which)[:, None] * SIZE + k_byte[None, :]
    queries = ()  # type: tuple
    for chunk in tl.static_range(KEY_CHUNKS):
        mask = some & (k_byte < KEY_CHUNK)[None, :]
        q = tl.load(q_at + chunk * KEY_CHUNK, mask=mask, other=0.0)
        if not UPCAST:
            q = tl.clamp(q, -65504.0, 65504.0).to(tl.float16)
        queries += (q,)
    summed = ()  # type: tuple
    for _ in tl.static_range(VALUE_CHUNKS):
        summed += (tl.zeros((QUERY_BLOCK, VALUE_BLOCK), tl.float32),)
    highest = tl.full((QUERY_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_BLOCK,), tl.float32)

    unit = tl.arange(0, UNITS)
    key_codes, key_scale, key_mean, value_codes, value_scale = tensors
    # A step takes the units at .. end - 1 of one block, UNITS of them at most; `after` is where the
    # next block ends. Everything a step needs is asked for before any of it is used.
    ends = starts + 1
    block = tl.load(tile_blocks + tile)
    end = tl.minimum(tl.load(ends + block), stop)
    while at < stop:
        after = tl.minimum(tl.load(ends + tl.minimum(block + 1, blocks - 1)), stop)
        there = at + unit < end
        slot = (at + unit).to(tl.int64)
        k_at = key_codes + slot[None, :] * (SIZE * KEY_BITS // 8)
        k_mask = (k_byte < KEY_CHUNK)[:, None] & there[None, :]
        k_codes = load_codes(k_at, k_byte[:, None], k_mask, KEY_BITS, KEY_CHUNK, KEY_ASSEMBLY)
        v_at = value_codes + slot[:, None] * (SIZE * VALUE_BITS // 8)
        v_mask = there[:, None] & (v_byte < VALUE_CHUNK)[None, :]
        v_codes = load_codes(v_at, v_byte[None, :], v_mask, VALUE_BITS, VALUE_CHUNK, VALUE_ASSEMBLY)
        k_scale = tl.load(key_scale + slot, mask=there, other=0.0).to(tl.float32)
        v_scale = tl.load(value_scale + slot, mask=there, other=0.0).to(tl.float32)
        mean = tl.load(key_mean + block.to(tl.int64) * SIZE + d, mask=d < SIZE, other=0.0)

        offset = tl.sum(plain * mean.to(tl.float32)[None, :], 1)
        logits = tl.zeros((QUERY_BLOCK, UNITS), tl.float32)
        for chunk in tl.static_range(KEY_CHUNKS):
            k = levels_at(k_codes, chunk, KEY_BITS, KEY_LEVELS, KEY_ASSEMBLY)
            logits = tl.dot(queries[chunk], k, acc=logits, input_precision="ieee")
        logits = (logits * k_scale[None, :] + offset[:, None]) * scaling
        logits = tl.where(there[None, :], logits, float("-inf"))
        weights, shrink, highest, total = weigh(logits, highest, total)
        # Relative to the largest scale here, so that float16 holds the weights of all units.
        largest = tl.max(v_scale, 0)
        weights *= (v_scale / tl.where(largest > 0.0, largest, 1.0))[None, :]
        weights = weights.to(queries[0].dtype)
        grown = ()  # type: tuple
        for chunk in tl.static_range(VALUE_CHUNKS):
            v = levels_at(v_codes, chunk, VALUE_BITS, VALUE_LEVELS, VALUE_ASSEMBLY)
            new = tl.dot(weights, v, input_precision="ieee") * largest
            grown += (summed[chunk] * shrink[:, None] + new,)
        summed = grown

        is_done = at + UNITS >= end
        at = tl.minimum(at + UNITS, end)
        block = tl.minimum(tl.where(is_done, block + 1, block), blocks - 1)
        end = tl.where(is_done, after, end)

    at_state = tile.to(tl.int64) * QUERIES + which
    tl.store(states[1] + at_state, log_sum(highest, total), mask=which < QUERIES)
    for chunk in tl.static_range(VALUE_CHUNKS):
        to = states[0] + at_state[:, None] * SIZE + (chunk * VALUE_CHUNK + v_byte)[None, :]
        mask = some & (v_byte < VALUE_CHUNK)[None, :]
        tl.store(to, average(summed[chunk], total), mask=mask)


# Nothing is compiled anew for these, which differ from prompt to prompt.
@triton.jit(do_not_specialize=["others_at", "tail_at", "tail_splits"])
def _merge(  # type: ignore[no-untyped-def]
    values,
    weights,
    out,
    firsts,
    other_firsts,
    others_at,
    tail_at,
    tail_splits,
    strides,
    NEW: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    ROOT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    which = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    sequence = b * tl.num_programs(1) + h
    d = tl.arange(0, SIZE_BLOCK)
    values += which * SIZE
    weights += which

    # Rotated states, then the others: those of other tiles and of the tail, counted through.
    first = tl.load(firsts + sequence)
    end = tl.load(firsts + sequence + 1)
    highest, total, rotated = _merged(
        values, weights, first, end, 0, 0, d, QUERIES, SIZE, SIZE_BLOCK, STEP
    )
    first = others_at + tl.load(other_firsts + sequence)
    end = others_at + tl.load(other_firsts + sequence + 1)
    tail = tail_at + sequence * tail_splits
    other_highest, other_total, plain = _merged(
        values, weights, first, end, tail, tail_splits, d, QUERIES, SIZE, SIZE_BLOCK, STEP
    )
    base = tl.maximum(highest, other_highest)
    base = tl.where(base == float("-inf"), 0.0, base)
    shrink = tl.exp2(highest - base)
    other_shrink = tl.exp2(other_highest - base)
    total = total * shrink + other_total * other_shrink
    inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
    rotated *= shrink * inverse * ROOT
    plain *= other_shrink * inverse

    q_head = (h * (QUERIES // NEW) + which // NEW).to(tl.int64)
    out += b.to(tl.int64) * strides[0] + q_head * strides[1] + (which % NEW) * strides[2]
    for start in tl.static_range(0, SIZE, ROWS):
        i = start + tl.arange(0, ROWS)
        x = hadamard_at(i[:, None], d[None, :], SIZE) * rotated[None, :]
        x += tl.where(i[:, None] == d[None, :], plain[None, :], 0.0)
        tl.store(out + i * strides[3], tl.sum(x, 1).to(out.dtype.element_ty), mask=i < SIZE)


@triton.jit
def _merged(  # type: ignore[no-untyped-def]
    values,
    weights,
    first,
    end,
    second,
    others,
    d,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The highest log2 of a sum of weights, the sum of all relative to it and that of values [D],
    of the states first .. end - 1 and of `others` more from state `second` on."""
    before = end - first
    count = before + others
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    summed = tl.zeros((SIZE_BLOCK,), tl.float32)
    for start in range(0, count, STEP):
        state = start + tl.arange(0, STEP)
        there = state < count
        at = tl.where(state < before, first + state, second + state - before)
        at = at.to(tl.int64) * QUERIES
        sums = tl.load(weights + at, mask=there, other=float("-inf"))
        mask = there[:, None] & (d < SIZE)[None, :]
        averages = tl.load(values + at[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
        higher = tl.maximum(highest, tl.max(sums, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(sums - base)
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(share, 0)
        summed = summed * shrink + tl.sum(share[:, None] * averages, 0)
        highest = higher
    return highest, total, summed
