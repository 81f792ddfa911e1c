"""Attention of a few queries over units of the scheme `rotated`, without rotating a unit back.

    q . k = H q . (scale * level) + q . mean       sum of w v = H (sum of w * scale * level)

So a query is rotated once, before, and the averages once, in the merge. Levels are looked up in
registers and are operands of the products as they are; the scales of keys go into the logits, those
of values into the weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from locret.kernels.decode_rotated_small import attend_small_rotated, takes_small_rotated
from locret.kernels.dispatch import (
    early,
    head_of,
    on_device,
    padded,
    start_next,
    tl,
    triton,
    wait_for_last,
)
from locret.kernels.packed import (
    STEP,
    PackedShares,
    is_wide,
    launch_options,
    next_step,
    step_arguments,
)
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
    leave_average,
    leave_sum,
    merged_states,
    queries_at,
    states_of,
    tile_at,
    weigh,
)

_STATES = 128  # states of rotated tiles that the merge reads at a time: it waits for each time
_OTHERS = 32  # others


def attend_rotated(
    query: Tensor, packed: RotatedKV, shares: PackedShares, scaling: float, states: States
) -> None:
    """Leave the attention over the tiles of packed units, rotated, in the first of `states`."""
    size, new = query.shape[3], query.shape[2]
    (_, *arguments), sizes = step_arguments(query, packed, shares, scaling, states)
    sizes["SIZE_BLOCK"] = padded(size, least=16)
    rotated = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    with on_device(query):
        _rotate[(new, query.shape[1], query.shape[0])](
            *(query, rotated, query.stride()),
            SIZE=size,
            SIZE_BLOCK=sizes["SIZE_BLOCK"],
            num_warps=4,
            **early(query),
        )
        if takes_small_rotated(sizes["QUERIES"], query.dtype, packed):
            attend_small_rotated(query, rotated, packed, shares, scaling, states)
            return
        how = launch_options(query, sizes["QUERIES"])
        key_bits, value_bits = bits_of(packed.key_levels), bits_of(packed.value_levels)
        _attend[(shares.count,)](
            *((query, rotated), *arguments),
            **sizes,
            KEY_BITS=key_bits,
            VALUE_BITS=value_bits,
            KEY_LEVELS=packed.key_levels if key_bits < 8 else (),
            VALUE_LEVELS=packed.value_levels if value_bits < 8 else (),
            KEY_BLOCK=padded(chunk_of(size, key_bits), least=16),
            VALUE_BLOCK=padded(chunk_of(size, value_bits), least=32),  # wider than a query block
            UNITS=max(16, min(STEP // (4 if is_wide(query) else 1), padded(packed.group))),
            KEY_ASSEMBLY=None if how["UPCAST"] else assembly(packed.key_levels),
            VALUE_ASSEMBLY=None if how["UPCAST"] else assembly(packed.value_levels),
            **how,
            **early(query),
        )


def merge_rotated(states: States, out: Tensor, shares: Sequence[Shares]) -> None:
    """`States.merge`, the averages of the first shares' tiles rotated back; those of the others and
    of the tails are not rotated."""
    queries, size = states.values.shape[1:]
    batch, q_heads, new, _ = out.shape
    with on_device(out):
        _merge[(queries, q_heads * new // queries, batch)](
            *states.merge_arguments(out, shares),
            NEW=new,
            QUERIES=queries,
            SIZE=size,
            SIZE_BLOCK=padded(size, least=16),
            STEP=_STATES,
            OTHERS=_OTHERS,
            num_warps=16,
            **early(out),
        )


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    query, rotated, strides, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    start_next(EARLY)
    wait_for_last(EARLY)
    t = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2)
    d = tl.arange(0, SIZE_BLOCK)
    at = query + b.to(tl.int64) * strides[0] + head * strides[1] + t * strides[2] + d * strides[3]
    x = tl.load(at, mask=d < SIZE, other=0.0).to(tl.float32)
    row = (b * tl.num_programs(1) + head) * tl.num_programs(0) + t
    tl.store(rotated + row * SIZE + d, _turned(x, SIZE, SIZE_BLOCK), mask=d < SIZE)


@triton.jit
def _turned(x, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """H x, of a vector padded with zeros. H is a product of two: among LOW channels that follow
    each other, and among those LOW apart."""
    LOW: tl.constexpr = 16 if SIZE % 16 == 0 else 8
    HIGH: tl.constexpr = SIZE_BLOCK // LOW
    i = tl.arange(0, LOW)
    signs = hadamard_at(i[:, None], i[None, :], LOW)
    x = tl.sum(tl.reshape(x, (HIGH, 1, LOW)) * signs[None, :, :], 2)
    j = tl.arange(0, HIGH)
    signs = hadamard_at(j[:, None], j[None, :], SIZE // LOW)  # symmetric
    # Along axis 0: Triton takes a sum along axis 1 of such a product for a matrix product, and
    # from 16 x 16 on does it in tf32, at 3 digits.
    x = tl.sum(signs[:, :, None] * x[:, None, :], 0)
    return tl.reshape(x, (SIZE_BLOCK,)) * (SIZE & -SIZE) ** -0.5


@triton.jit(do_not_specialize=["heads", "blocks"])
def _attend(  # type: ignore[no-untyped-def]
    queries, tensors, where, states, scaling, heads, blocks, query_strides,
    NEW: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_LEVELS: tl.constexpr,
    VALUE_LEVELS: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, UNITS: tl.constexpr,
    UPCAST: tl.constexpr,  # to float32 by plain arithmetic; the interpreter knows no other
    KEY_ASSEMBLY: tl.constexpr, VALUE_ASSEMBLY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start_next(EARLY)
    wait_for_last(EARLY)
    KEY_CHUNKS: tl.constexpr = 8 // (KEY_BITS - KEY_BITS % 2)
    VALUE_CHUNKS: tl.constexpr = 8 // (VALUE_BITS - VALUE_BITS % 2)
    KEY_CHUNK: tl.constexpr = SIZE // KEY_CHUNKS
    VALUE_CHUNK: tl.constexpr = SIZE // VALUE_CHUNKS
    starts, tiles, tile_blocks = where
    tile = tl.program_id(0)
    sequence, at, stop = tile_at(tiles, tile)
    b, h = head_of(sequence, heads)

    # The query as it is, for the means, and rotated, in the chunks that keys are multiplied in.
    which = tl.arange(0, QUERY_BLOCK)
    some = (which < QUERIES)[:, None]
    d = tl.arange(0, SIZE_BLOCK)
    k_byte = tl.arange(0, KEY_BLOCK)
    v_byte = tl.arange(0, VALUE_BLOCK)
    query, rotated = queries
    q_at = queries_at(query, query_strides, b, h, which, NEW, QUERIES)
    q_at = q_at[:, None] + d[None, :] * query_strides[3]
    plain = tl.load(q_at, mask=some & (d < SIZE)[None, :], other=0.0).to(tl.float32)
    q_at = rotated + (sequence * QUERIES + which)[:, None] * SIZE + k_byte[None, :]
    chunks = ()  # type: tuple
    for chunk in tl.static_range(KEY_CHUNKS):
        mask = some & (k_byte < KEY_CHUNK)[None, :]
        q = tl.load(q_at + chunk * KEY_CHUNK, mask=mask, other=0.0)
        if not UPCAST:
            q = tl.clamp(q, -65504.0, 65504.0).to(tl.float16)
        chunks += (q,)
    summed = ()  # type: tuple
    for _ in tl.static_range(VALUE_CHUNKS):
        summed += (tl.zeros((QUERY_BLOCK, VALUE_BLOCK), tl.float32),)
    highest = tl.full((QUERY_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_BLOCK,), tl.float32)

    unit = tl.arange(0, UNITS)
    key_codes, key_scale, key_mean, value_codes, value_scale = tensors
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
            logits = tl.dot(chunks[chunk], k, acc=logits, input_precision="ieee")
        logits = (logits * k_scale[None, :] + offset[:, None]) * scaling
        logits = tl.where(there[None, :], logits, float("-inf"))
        weights, shrink, highest, total = weigh(logits, highest, total)
        # Relative to the largest scale here, so that float16 holds the weights of all units.
        largest = tl.max(v_scale, 0)
        weights *= (v_scale / tl.where(largest > 0.0, largest, 1.0))[None, :]
        weights = weights.to(chunks[0].dtype)
        grown = ()  # type: tuple
        for chunk in tl.static_range(VALUE_CHUNKS):
            v = levels_at(v_codes, chunk, VALUE_BITS, VALUE_LEVELS, VALUE_ASSEMBLY)
            new = tl.dot(weights, v, input_precision="ieee") * largest
            grown += (summed[chunk] * shrink[:, None] + new,)
        summed = grown

        at, end, block = next_step(at, end, after, block, blocks, UNITS)

    to = leave_sum(states[1], tile, which, highest, total, QUERIES)
    for chunk in tl.static_range(VALUE_CHUNKS):
        d = chunk * VALUE_CHUNK + v_byte
        there = v_byte < VALUE_CHUNK
        leave_average(states[0], to, which, d, there, total, summed[chunk], QUERIES, SIZE)


@triton.jit(do_not_specialize=["others_at", "tail_at", "tail_splits"])
def _merge(  # type: ignore[no-untyped-def]
    states, out, firsts, other_firsts, others_at, tail_at, tail_splits, strides,
    NEW: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    STEP: tl.constexpr, OTHERS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start_next(EARLY)
    wait_for_last(EARLY)
    which = tl.program_id(0)
    d = tl.arange(0, SIZE_BLOCK)
    sequence = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)

    # Rotated states, then the others: those of other tiles and of the tail.
    tiles = states_of(firsts, sequence, 0)
    highest, total, rotated = merged_states(
        states, tiles, (0, 0), (0, 0), which, d, QUERIES, SIZE, SIZE_BLOCK, STEP
    )
    tiles = states_of(other_firsts, sequence, others_at)
    tail = (tail_at + sequence * tail_splits, tail_splits)
    other_highest, other_total, plain = merged_states(
        states, tiles, tail, (0, 0), which, d, QUERIES, SIZE, SIZE_BLOCK, OTHERS
    )
    base = tl.maximum(highest, other_highest)
    base = tl.where(base == float("-inf"), 0.0, base)
    shrink = tl.exp2(highest - base)
    other_shrink = tl.exp2(other_highest - base)
    total = total * shrink + other_total * other_shrink
    inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
    x = _turned(rotated * (shrink * inverse), SIZE, SIZE_BLOCK) + plain * (other_shrink * inverse)

    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    to = queries_at(out, strides, b, h, which, NEW, QUERIES) + d * strides[3]
    tl.store(to, x.to(out.dtype.element_ty), mask=d < SIZE)
