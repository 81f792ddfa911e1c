"""Attention of at most eight queries a KV head over units of the scheme `rotated`, on tensor cores,
without rotating a unit back.

A program is one warp, and every tensor is loaded in the order in which the
operands of a tensor core lie in its lanes, as in `decode_kivi`: no barrier and no shared
memory stands between a load and its use. Levels are looked up in those registers
(`rotated_levels`), keys as they are and values of two units at a time. Scales of keys go into the
logits, those of values into the weights.

Which channel an operand's row belongs to is a matter of how queries, means and results are
addressed. Results do not depend on how a compiler lays tensors out.
"""

import torch
from torch import Tensor

from locret.kernels.decode_general import STEP, PackedShares, next_step, step_arguments
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
from locret.kernels.packed import RotatedKV
from locret.kernels.rotated_levels import (
    bits_of,
    chunks_of,
    key_assembly,
    key_levels,
    table_words,
    turned,
    value_assembly,
    value_levels,
)
from locret.kernels.splits import States, leave_sum, queries_at, tile_at

SMALL = 8  # queries of a KV head (G * T)
PROGRAMS = 12  # programs, of one warp, that share a multiprocessor
REGISTERS = 168  # of a thread, so that PROGRAMS fit
_LIFT = 4  # log2: weights at this scale, so that few underflow
_SIZES = (64, 128, 256)  # head sizes that fill whole words of each lane


def rotate_queries(query: Tensor) -> Tensor:
    """H q of queries [B, H*G, T, D]: float32, contiguous."""
    batch, heads, new, size = query.shape
    rotated = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    with on_device(query):
        _rotate[(new, heads, batch)](
            *(query, rotated, query.stride()),
            SIZE=size,
            SIZE_BLOCK=padded(size, least=16),
            num_warps=4,
            **early(query),
        )
    return rotated


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
    tl.store(rotated + row * SIZE + d, turned(x, SIZE, SIZE_BLOCK), mask=d < SIZE)


def takes_small_rotated(queries: int, dtype: torch.dtype, packed: RotatedKV) -> bool:
    """Whether `attend_small_rotated` covers so many queries a KV head of this dtype, and these
    units."""
    return (
        queries <= SMALL
        and dtype in (torch.float16, torch.bfloat16)
        and torch.version.hip is None  # the assembly is NVIDIA's
        and packed.keys[2].shape[1] in _SIZES
        and all(codes.data_ptr() % 8 == 0 for codes in (packed.keys[0], packed.values[0]))
    )


def attend_small_rotated(
    query: Tensor,
    rotated: Tensor,
    packed: RotatedKV,
    shares: PackedShares,
    scaling: float,
    states: States,
    beside: bool = False,
) -> None:
    """Leave the attention over the tiles of packed units, rotated, in the first of `states`.

    Args:
        rotated: the query rotated, float32, contiguous.
        beside: it may work while the last kernel does, which has waited for the one before it.
    """
    (tensors, *arguments), sizes = step_arguments(query, packed, shares, scaling, states)
    k_codes, *k_tables, v_codes, v_scale = tensors
    k_bits, v_bits = bits_of(packed.key_levels), bits_of(packed.value_levels)
    size = query.shape[3]
    nbytes = size * (k_bits + v_bits) // 16
    with on_device(query):
        _attend_small[(shares.count,)](
            (query, rotated),
            (k_codes.view(torch.int16), *k_tables, v_codes.view(torch.int16), v_scale),
            *arguments,
            **sizes,
            BITS=(k_bits, v_bits),
            KEY_LEVELS=packed.key_levels if k_bits < 8 else (),
            VALUE_LEVELS=packed.value_levels if v_bits < 8 else (),
            PLANES=(size // chunks_of(k_bits), size // chunks_of(v_bits)),
            # In whole 16s. 32 took 78 us where 64 took 88 (65,536 units of 3 bits in 8 heads, on
            # an H200).
            UNITS=max(16, min(STEP // 2, STEP * 64 // nbytes // 16 * 16)),
            LIFT=_LIFT,
            KEY_ASSEMBLY=None if INTERPRETED else key_assembly(packed.key_levels),
            VALUE_ASSEMBLY=None if INTERPRETED else value_assembly(packed.value_levels, size),
            BESIDE=beside,
            num_warps=1,
            maxnreg=REGISTERS,
            **early(query),
        )


@triton.jit(do_not_specialize=["heads", "blocks"])
def _attend_small(  # type: ignore[no-untyped-def]
    queries, tensors, where, states, scaling, heads, blocks, query_strides,
    NEW: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr,
    KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr, PLANES: tl.constexpr, UNITS: tl.constexpr,
    LIFT: tl.constexpr, KEY_ASSEMBLY: tl.constexpr, VALUE_ASSEMBLY: tl.constexpr,
    BESIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start_next(EARLY)
    wait_for_last(EARLY and not BESIDE)
    SMALL: tl.constexpr = 8
    SUBTILES: tl.constexpr = UNITS // 16
    K_PLANE: tl.constexpr = PLANES[0]  # bytes of a unit, and channels of a chunk
    V_PLANE: tl.constexpr = PLANES[1]
    K_CHUNKS: tl.constexpr = SIZE // K_PLANE
    V_CHUNKS: tl.constexpr = SIZE // V_PLANE
    K_UNIT: tl.constexpr = SIZE * BITS[0] // 16  # 16-bit words
    V_UNIT: tl.constexpr = SIZE * BITS[1] // 16
    # Words of a unit that a lane reads, and those that it uses, 32 bits wide: of values it may use
    # half of one. Operands of keys are chunks, or halves of them where these are wide enough.
    K_WORDS: tl.constexpr = K_PLANE // 8
    V_WORDS: tl.constexpr = max(2, V_PLANE // 16)
    V_BYTES: tl.constexpr = min(4, V_PLANE // 8)
    K_LOADS: tl.constexpr = 2 if BITS[0] == 3 else 1
    V_LOADS: tl.constexpr = 2 if BITS[1] == 3 else 1
    PARTS: tl.constexpr = min(2, K_WORDS // 2)
    WIDE: tl.constexpr = K_WORDS // 2 // PARTS
    SLABS: tl.constexpr = K_CHUNKS * PARTS
    starts, tiles, tile_blocks = where
    tile = tl.program_id(0)
    sequence, at, stop = tile_at(tiles, tile)
    b, h = head_of(sequence, heads)

    query, turned = queries
    which = tl.arange(0, SMALL)
    some = (which < QUERIES)[:, None]
    q_at = queries_at(query, query_strides, b, h, which, NEW, QUERIES)
    r_at = turned + (sequence * QUERIES + which).to(tl.int64) * SIZE
    position = tl.arange(0, 16 * WIDE)  # of the operand
    channel = position // 4 % 4 * (2 * K_WORDS) + position // 16 * 4 + position % 4
    plain = ()  # type: tuple
    rotated = ()  # type: tuple
    for slab in tl.static_range(0, SLABS, 2):
        d = slab // PARTS * K_PLANE + slab % PARTS * (4 * WIDE) + channel
        other = (slab + 1) // PARTS * K_PLANE + (slab + 1) % PARTS * (4 * WIDE) + channel
        x = tl.load(q_at[:, None] + d[None, :] * query_strides[3], mask=some, other=0.0)
        y = tl.load(q_at[:, None] + other[None, :] * query_strides[3], mask=some, other=0.0)
        both = _stacked(x, y, WIDE)
        if KEY_ASSEMBLY is None:
            both = both.to(tl.float32)
        plain += (both,)
        x = tl.load(r_at[:, None] + d[None, :], mask=some, other=0.0)
        y = tl.load(r_at[:, None] + other[None, :], mask=some, other=0.0)
        both = tl.clamp(_stacked(x, y, WIDE) * scaling, -65504.0, 65504.0)
        rotated += (both.to(tl.float16),)
    summed = ()  # type: tuple
    for _ in tl.static_range(V_CHUNKS * (V_BYTES // 2)):
        summed += (tl.zeros((8 * V_WORDS, SMALL), tl.float32),)
    base = tl.full((SMALL,), float("-inf"), tl.float32)
    total = tl.zeros((SMALL, 16), tl.float32)

    # Offsets of what a lane reads, the lanes [8, 4], 8 quads of 4, before the words.
    quad = tl.arange(0, 8)[None, :, None, None]
    lane = tl.arange(0, 4)[None, None, :, None]
    half = tl.arange(0, 2)[:, None, None, None]
    word = tl.arange(0, K_WORDS)[None, None, None, :]
    k_unit = half * 8 + quad
    k_at = k_unit * K_UNIT + (lane * K_WORDS + word)
    k_high = k_unit * K_UNIT + (K_PLANE // 2 + lane % 2 * K_WORDS + word)
    k_shift = tl.broadcast_to(lane // 2, (2, 8, 4, WIDE))
    first = quad * (V_PLANE // 16) if V_BYTES == 4 else quad // 2 * 2
    high = quad % 4 * (V_PLANE // 16) if V_BYTES == 4 else quad % 4 // 2 * 2
    word = tl.arange(0, V_WORDS)[None, None, None, :]
    v_unit = half * 8 + lane * 2
    v_at = v_unit * V_UNIT + (first + word)
    v_high = v_unit * V_UNIT + (V_PLANE // 2 + high + word)
    v_shift = tl.broadcast_to(quad // 4, (2, 8, 4, V_WORDS // 2))
    v_pick = tl.broadcast_to(quad % 2, (2, 8, 4, V_WORDS // 2))
    channel = tl.arange(0, 4 * WIDE)[None, None, :]
    of_mean = tl.arange(0, 4)[None, :, None] * (2 * K_WORDS) + channel
    of_mean += tl.arange(0, 8)[:, None, None] * 0
    # Every second unit of those that a lane has logits of.
    s_unit = tl.arange(0, 2)[:, None, None] * 8 + tl.arange(0, 4)[None, None, :] * 2
    s_unit += tl.arange(0, 8)[None, :, None] * 0
    unit = tl.arange(0, 16)
    k_tables = table_words(KEY_ASSEMBLY)
    v_tables = table_words(VALUE_ASSEMBLY)

    key_codes, key_scale, key_mean, value_codes, value_scale = tensors
    ends = starts + 1
    block = tl.load(tile_blocks + tile)
    end = tl.minimum(tl.load(ends + block), stop)
    while at < stop:
        after = tl.minimum(tl.load(ends + tl.minimum(block + 1, blocks - 1)), stop)
        at_key = key_codes + at.to(tl.int64) * K_UNIT
        at_value = value_codes + at.to(tl.int64) * V_UNIT
        k_words = ()  # type: tuple
        v_words = ()  # type: tuple
        k_scales = ()  # type: tuple
        v_scales = ()  # type: tuple
        means = ()  # type: tuple
        for sub in tl.static_range(SUBTILES):
            left = end - at - 16 * sub
            here = at_key + 16 * sub * K_UNIT
            k_words += (tl.load(here + k_at, mask=k_unit < left, other=0),)
            if BITS[0] == 3:
                k_words += (tl.load(here + k_high, mask=k_unit < left, other=0),)
            k_scales += (_scales(key_scale + at + 16 * sub, s_unit, left),)
        at_mean = key_mean + block.to(tl.int64) * SIZE
        for slab in tl.static_range(SLABS):
            of_slab = slab // PARTS * K_PLANE + slab % PARTS * (4 * WIDE)
            means += (tl.load(at_mean + of_slab + of_mean),)
        for sub in tl.static_range(SUBTILES):
            left = end - at - 16 * sub
            for i in tl.static_range(2):
                here = at_value + (16 * sub + i) * V_UNIT
                v_words += (tl.load(here + v_at, mask=v_unit + i < left, other=0),)
                if BITS[1] == 3:
                    v_words += (tl.load(here + v_high, mask=v_unit + i < left, other=0),)
            v_scales += (_scales(value_scale + at + 16 * sub, s_unit, left),)

        offset = _offset(plain, means, SLABS, WIDE) * scaling

        logits = ()  # type: tuple
        highest = tl.full((SMALL, 16), float("-inf"), tl.float32)
        largest = tl.full((SMALL, 16), 2.0**-24, tl.float32)
        for sub in tl.static_range(SUBTILES):
            met = tl.full((SMALL, 16), float("-inf"), tl.float32)
            if at + 16 * sub < end:
                words = _pieces(k_words[K_LOADS * sub], PARTS, KEY_ASSEMBLY)
                tops = _pieces(k_words[K_LOADS * sub + K_LOADS - 1], PARTS, KEY_ASSEMBLY)
                levels = ()  # type: tuple
                for part in tl.static_range(PARTS):
                    given = (words[part], tops[part], k_shift)
                    levels += key_levels(given, k_tables, BITS[0], KEY_LEVELS, KEY_ASSEMBLY)
                met = _products(rotated, levels, K_CHUNKS, PARTS, WIDE)
                met = met * k_scales[sub].to(tl.float32) + offset[:, None]
                there = at + 16 * sub + unit < end
                met = tl.where(there[None, :], met, float("-inf"))
            logits += (met,)
            highest = tl.maximum(highest, logits[sub])
            largest = tl.maximum(largest, v_scales[sub].to(tl.float32))

        # Online softmax. The first step has a unit, so that what is subtracted is finite. Relative
        # to the largest scale too, so that float16 holds the weights of all units.
        higher = tl.max(highest, 1) + tl.log2(tl.max(largest, 1)) - LIFT
        higher = tl.maximum(base, higher)
        shrink = tl.exp2(base - higher)
        base = higher
        total = total * shrink[:, None]
        grown = ()  # type: tuple
        for i in tl.static_range(V_CHUNKS * (V_BYTES // 2)):
            grown += (summed[i] * shrink[None, :],)
        summed = grown
        for sub in tl.static_range(SUBTILES):
            if at + 16 * sub < end:
                weights = _exp2(logits[sub] - base[:, None], KEY_ASSEMBLY)
                total += weights
                scaled = (weights * v_scales[sub].to(tl.float32)).to(tl.float16)
                scaled = tl.permute(tl.reshape(scaled, (8, 2, 4, 2)), (2, 1, 3, 0))
                scaled = tl.reshape(scaled, (16, 8))
                units = ()  # type: tuple
                for i in tl.static_range(2):
                    units += _pieces(v_words[V_LOADS * (2 * sub + i)], 1, KEY_ASSEMBLY)
                for i in tl.static_range(2):
                    top = v_words[V_LOADS * (2 * sub + i) + V_LOADS - 1]
                    units += _pieces(top, 1, KEY_ASSEMBLY)
                units += (v_shift, v_pick)
                levels = value_levels(
                    units, v_tables, V_BYTES, BITS[1], VALUE_LEVELS, VALUE_ASSEMBLY
                )
                grown = ()
                for i in tl.static_range(V_CHUNKS * (V_BYTES // 2)):
                    v = _rows(levels, 4 * i, V_WORDS // 2)
                    grown += (tl.dot(v, scaled, acc=summed[i]),)
                summed = grown

        at, end, block = next_step(at, end, after, block, blocks, UNITS)

    in_all = tl.sum(total, 1)
    inverse = 1.0 / tl.where(in_all > 0.0, in_all, 1.0)
    at_state = leave_sum(states[1], tile, which, base, in_all, QUERIES)
    position = tl.arange(0, 8 * V_WORDS)
    byte = position % 8 * (V_PLANE // 8) + position // 16 * 4 + position // 8 % 2
    for i in tl.static_range(V_CHUNKS * (V_BYTES // 2)):
        d = i // (V_BYTES // 2) * V_PLANE + i % (V_BYTES // 2) * 2 + byte
        to = states[0] + at_state[None, :] * SIZE + d[:, None]
        tl.store(to, summed[i] * inverse[None, :], mask=(which < QUERIES)[None, :])
    wait_for_last(EARLY and BESIDE)  # the next kernel waits for this one alone


@triton.jit
def _stacked(x, y, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[16, 16 * WIDE], the least rows that a tensor core takes, of two [8, 16 * WIDE]."""
    return tl.reshape(tl.permute(tl.join(x, y), (2, 0, 1)), (16, 16 * WIDE))


@triton.jit
def _met(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The upper half of `x` [16, N] and the lower one of `y`, added up: what each of two stacked
    operands has met."""
    upper, _ = tl.split(tl.permute(tl.reshape(x, (2, 8, N)), (1, 2, 0)))
    _, lower = tl.split(tl.permute(tl.reshape(y, (2, 8, N)), (1, 2, 0)))
    return upper + lower


@triton.jit
def _offset(plain, means, SLABS: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The products of the queries and a block's mean, [8]."""
    even = tl.zeros((16, 8), tl.float32)
    odd = tl.zeros((16, 8), tl.float32)
    for slab in tl.static_range(SLABS):
        mean = tl.permute(tl.reshape(means[slab], (8, 4, WIDE, 4)), (2, 1, 3, 0))
        mean = tl.reshape(mean, (16 * WIDE, 8)).to(plain[0].dtype)
        if slab % 2 == 0:
            even = tl.dot(plain[slab // 2], mean, acc=even)
        else:
            odd = tl.dot(plain[slab // 2], mean, acc=odd)
    return tl.max(_met(even, odd, 8), 1)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    rotated, levels, CHUNKS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr
):
    """The products of the queries and the levels of 16 keys, [8, 16]."""
    even = tl.zeros((16, 16), tl.float32)
    odd = tl.zeros((16, 16), tl.float32)
    for slab in tl.static_range(CHUNKS * PARTS):
        k = _operand(levels, (slab % PARTS * CHUNKS + slab // PARTS) * 4, WIDE)
        if slab % 2 == 0:
            even = tl.dot(rotated[slab // 2], k, acc=even)
        else:
            odd = tl.dot(rotated[slab // 2], k, acc=odd)
    return _met(even, odd, 16)


@triton.jit
def _scales(at, unit, left):  # type: ignore[no-untyped-def]
    """The scales of 16 units, of which `left` are there, [8, 16] as the logits lie."""
    even = tl.load(at + unit, mask=unit < left, other=0.0)
    odd = tl.load(at + 1 + unit, mask=unit + 1 < left, other=0.0)
    return tl.reshape(tl.permute(tl.join(even, odd), (1, 0, 2, 3)), (8, 16))


@triton.jit
def _exp2(x, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """2**x, zero where that is below the normal range."""
    if ASSEMBLY is None:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def _pieces(words, PARTS: tl.constexpr, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tuple of 32-bit words [2, 8, 4, any] of pairs of 16-bit words [2, 8, 4, any]."""
    wide: tl.constexpr = words.shape[3] // 2
    low, high = tl.split(tl.reshape(words, (2, 8, 4, wide, 2)))
    if ASSEMBLY is None:
        x = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    else:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, {$1, $2};", "=r,h,h", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    pieces = (x,)
    if PARTS == 2:
        x = tl.permute(tl.reshape(x, (2, 8, 4, 2, wide // 2)), (0, 1, 2, 4, 3))
        pieces = tl.split(x)
    return pieces


@triton.jit
def _operand(levels, first: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[16 * WIDE, 16] of the four bytes of what lanes have of 16 units, [2, 8, 4, WIDE] each."""
    even = tl.join(levels[first], levels[first + 2])
    odd = tl.join(levels[first + 1], levels[first + 3])
    return tl.reshape(tl.permute(tl.join(even, odd), (3, 2, 4, 5, 0, 1)), (16 * WIDE, 16))


@triton.jit
def _rows(levels, first: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[16 * WIDE, 16] of two bytes of what lanes have of twice 8 units, [2, 8, 4, WIDE] each."""
    even = tl.join(levels[first], levels[first + 2])
    odd = tl.join(levels[first + 1], levels[first + 3])
    return tl.reshape(tl.permute(tl.join(even, odd), (3, 4, 1, 2, 0, 5)), (16 * WIDE, 16))
