"""Attention of at most eight queries a KV head over units packed as KIVI packs them, on tensor
cores, without expanding a unit.

A code is multiplied as it lies: masked out of its word, its bits are those of a float16 below the
normal range, code * 2**(shift - 24) exactly. Scales go into the other operand, those of keys into
the query of a block, those of values into the weights; minima are a product of their own. So a
multiplication costs half an instruction a code, and what it reads is what the units occupy.

A program is one warp, and every tensor is loaded in the order in which the operands of a tensor
core lie in its lanes: no barrier and hardly any shared memory stands between a load and its use.
The permutations here are about that alone: a lane reads what lies side by side, and of an operand
it holds every fourth pair or quadruple. Results do not depend on how a compiler lays tensors out.
"""

import functools

import torch
from torch import Tensor

from locret.kernels.decode_general import (
    STEP,
    PackedShares,
    next_step,
    power_of_two_in,
    step_arguments,
)
from locret.kernels.dispatch import INTERPRETED, head_of, on_device, tl, triton
from locret.kernels.packed import PackedKV
from locret.kernels.splits import States, leave_sum, queries_at, tile_at

SMALL = 8  # queries of a KV head (G * T)
PROGRAMS = 11  # programs, of one warp, that share a multiprocessor
REGISTERS = 168  # of a thread, so that PROGRAMS fit
_ROOM = -4  # log2: queries are multiplied in float16 at this scale, so that none overflows
_LIFT = 4  # log2: weights at this scale, so that few underflow


def span_of(size: int, nbytes: int, group: int) -> int:
    """How many bytes that follow each other, at most 64, belong plane by plane to one group."""
    return power_of_two_in(nbytes, 64, 0 if group >= size else group)


def takes_small(queries: int, dtype: torch.dtype, packed: PackedKV) -> bool:
    """Whether `attend_small` covers so many queries a KV head of this dtype, and these units."""
    size, nbytes = packed.keys[1].shape[1], packed.keys[0].shape[1]
    return (
        queries <= SMALL
        and dtype in (torch.float16, torch.bfloat16)
        and torch.version.hip is None  # the assembly is NVIDIA's
        and span_of(size, nbytes, packed.group) >= 32
        and size == nbytes * 8 // packed.bits
        and all(map(_in_pairs, (*packed.keys, packed.values[0])))
    )


def _in_pairs(tensor: Tensor) -> bool:
    """Whether two elements that lie side by side can be read as one."""
    even = tensor.storage_offset() % 2 == 0 and tensor.shape[1] % 2 == 0
    return even and tensor.data_ptr() % (2 * tensor.element_size()) == 0


def attend_small(
    query: Tensor, packed: PackedKV, shares: PackedShares, scaling: float, states: States
) -> None:
    """Leave the attention over the tiles of packed units in the first of `states`."""
    nbytes = packed.keys[0].shape[1]
    span = span_of(query.shape[3], nbytes, packed.group)
    pair = 2 if all(map(_in_pairs, packed.values[1:])) else 1
    wide = torch.int32 if pair == 2 else torch.float16
    dtypes = (torch.int16, torch.int32, torch.int32, torch.int16, wide, wide)
    (tensors, *arguments), sizes = step_arguments(query, packed, shares, scaling, states)
    tensors = tuple(map(torch.Tensor.view, tensors, dtypes))
    with on_device(query):
        _attend_small[(shares.count,)](
            *(query, tensors, *arguments),
            **sizes,
            BITS=packed.bits,
            ENTRIES=_entries(nbytes, span, packed.bits, packed.group),
            SPAN=span,
            UNITS=max(16, min(STEP, STEP * 64 // nbytes) // 16 * 16),  # whole steps of 16
            PAIR=pair,
            GROUPS=tensors[4].shape[1],
            ROOM=_ROOM,
            LIFT=_LIFT,
            ASSEMBLY=None if INTERPRETED else assembly(packed.bits),
            num_warps=1,
            maxnreg=REGISTERS,
        )


@functools.cache
def _entries(nbytes: int, span: int, bits: int, group: int) -> tuple[int, ...]:
    """The group of channels to which each slab belongs, a plane of a span."""
    planes = 8 // bits
    return tuple(
        (plane * nbytes + start) // group
        for start in range(0, nbytes, span)
        for plane in range(planes)
    )


@functools.cache
def assembly(bits: int) -> tuple[str, ...]:
    """For the low and the high byte of each plane, PTX that masks the codes of two 16-bit words;
    after them, for the low and the high half, PTX that takes it of two 32-bit words."""
    planes = tuple(
        f"{{ .reg .b32 word; shr.b32 word, $1, {8 * high}; "
        f"and.b32 $0, word, {((2**bits - 1) << shift) * 0x00010001:#010x}; }}"
        for shift in range(0, 8, bits)
        for high in range(2)
    )
    return *planes, "prmt.b32 $0, $1, $2, 0x5410;", "prmt.b32 $0, $1, $2, 0x7632;"


@triton.jit(do_not_specialize=["heads", "blocks"])
def _attend_small(  # type: ignore[no-untyped-def]
    query, tensors, where, states, scaling, heads, blocks, query_strides,
    NEW: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr,
    ENTRIES: tl.constexpr, SPAN: tl.constexpr, UNITS: tl.constexpr, PAIR: tl.constexpr,
    GROUPS: tl.constexpr, ROOM: tl.constexpr, LIFT: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    # Codes come in 16-bit words: a span is WORDS words of a unit. A slab is a plane of a span,
    # two operands: of its low bytes and of its high bytes (`parity`).
    BYTES: tl.constexpr = (SIZE * BITS + 7) // 8
    PLANES: tl.constexpr = 8 // BITS
    SLABS: tl.constexpr = PLANES * (BYTES // SPAN)
    WORDS: tl.constexpr = SPAN // 2
    UNIT: tl.constexpr = BYTES // 2  # words
    SUBTILES: tl.constexpr = UNITS // 16
    # Entries of a unit's tables are read as PAIR at once.
    TABLES: tl.constexpr = (ENTRIES[SLABS - 1] + 1) // PAIR
    SMALL: tl.constexpr = 8
    starts, tiles, tile_blocks = where
    tile = tl.program_id(0)
    sequence, at, stop = tile_at(tiles, tile)
    b, h = head_of(sequence, heads)

    which = tl.arange(0, SMALL)
    q_at = queries_at(query, query_strides, b, h, which, NEW, QUERIES)
    q_d = query_strides[3]
    position = tl.arange(0, WORDS)  # of the operand
    word = position // 4 % 4 * (WORDS // 4) + position // 16 * 4 + position % 4
    queries = ()  # type: tuple
    summed = ()  # type: tuple
    lows = ()  # type: tuple
    for slab in tl.static_range(SLABS):
        start = slab % PLANES * BYTES + slab // PLANES * SPAN  # the first channel
        for parity in tl.static_range(2):
            channel = start + 2 * word + parity
            q = tl.load(
                q_at[:, None] + channel[None, :] * q_d, mask=(which < QUERIES)[:, None], other=0.0
            )
            q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0)
            queries += ((q * 2.0 ** (ROOM - slab % PLANES * BITS)).to(tl.float16),)
            summed += (tl.zeros((WORDS, SMALL), tl.float32),)
        lows += (tl.zeros((SMALL, 16), tl.float32),)
    base = tl.full((SMALL,), float("-inf"), tl.float32)
    total = tl.zeros((SMALL, 16), tl.float32)

    # Offsets of what a lane reads: [4, 8, .., words], 8 quads of 4 lanes.
    lane = tl.arange(0, 4)[:, None, None, None]
    quad = tl.arange(0, 8)[None, :, None, None]
    fourth: tl.constexpr = WORDS // 4
    k_unit = tl.arange(0, 2)[None, None, :, None] * 8 + quad
    k_at = k_unit * UNIT + (lane * fourth + tl.arange(0, fourth)[None, None, None, :])
    v_step = tl.arange(0, 4)[None, None, :, None]
    v_unit = v_step // 2 * 8 + lane * 2 + v_step % 2
    v_at = v_unit * UNIT + (quad * (WORDS // 8) + tl.arange(0, WORDS // 8)[None, None, None, :])
    of_table = tl.arange(0, WORDS // 16)[None, None, :, None] * 4 + quad * 0
    of_table += lane * fourth + tl.arange(0, 4)[None, None, None, :]
    unit = tl.arange(0, 16)

    key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum = tensors

    ends = starts + 1
    block = tl.load(tile_blocks + tile)
    end = tl.minimum(tl.load(ends + block), stop)
    while at < stop:
        after = tl.minimum(tl.load(ends + tl.minimum(block + 1, blocks - 1)), stop)
        scales = ()  # type: tuple
        minima = ()  # type: tuple
        at_scale = key_scale + block.to(tl.int64) * (SIZE // 2)
        at_low = key_minimum + block.to(tl.int64) * (SIZE // 2)
        for slab in tl.static_range(SLABS):
            start = (slab % PLANES * BYTES + slab // PLANES * SPAN) // 2
            scales += (tl.load(at_scale + start + of_table),)
            minima += (tl.load(at_low + start + of_table),)
        k_words = ()  # type: tuple
        v_words = ()  # type: tuple
        v_scales = ()  # type: tuple
        v_minima = ()  # type: tuple
        at_key = key_codes + at.to(tl.int64) * UNIT
        at_value = value_codes + at.to(tl.int64) * UNIT
        at_scales = value_scale + at.to(tl.int64) * GROUPS
        at_lows = value_minimum + at.to(tl.int64) * GROUPS
        for sub in tl.static_range(SUBTILES):
            left = end - at - 16 * sub
            for piece in tl.static_range(BYTES // SPAN):
                here = at_key + (16 * sub * UNIT + piece * WORDS)
                k_words += (tl.load(here + k_at, mask=k_unit < left, other=0),)
            for piece in tl.static_range(BYTES // SPAN):
                here = at_value + (16 * sub * UNIT + piece * WORDS)
                v_words += (tl.load(here + v_at, mask=v_unit < left, other=0),)
            there = unit < left
            for table in tl.static_range(TABLES):
                here = at_scales + (16 * sub * GROUPS + table)
                v_scales += (tl.load(here + unit * GROUPS, mask=there, other=0),)
                here = at_lows + (16 * sub * GROUPS + table)
                v_minima += (tl.load(here + unit * GROUPS, mask=there, other=0),)

        # The query in units of the codes of this block above, the query itself below: that one
        # meets the minima.
        both = ()  # type: tuple
        offset = tl.zeros((SMALL,), tl.float32)
        for slab in tl.static_range(SLABS):
            below = tl.zeros((16, SMALL), tl.float32)
            for parity in tl.static_range(2):
                plain = queries[2 * slab + parity]
                scaled = plain * _table(scales[slab], parity, WORDS, ASSEMBLY)
                low = tl.trans(_table(minima[slab], parity, WORDS, ASSEMBLY))
                stacked = tl.reshape(tl.permute(tl.join(scaled, plain), (2, 0, 1)), (16, WORDS))
                both += (stacked,)
                below = tl.dot(stacked, low, acc=below)
            _, met = _halved(below, SMALL)
            offset += tl.max(met, 1) * 2.0 ** (slab % PLANES * BITS)
        offset = offset * (scaling * 2.0**-ROOM)

        logits = ()  # type: tuple
        highest = tl.full((SMALL, 16), float("-inf"), tl.float32)
        for sub in tl.static_range(SUBTILES):
            product = tl.zeros((16, 16), tl.float32)
            for slab in tl.static_range(SLABS):
                words = k_words[sub * (BYTES // SPAN) + slab // PLANES]
                words = tl.reshape(words, (4, 8, 2, WORDS // 16, 4))
                words = tl.reshape(tl.permute(words, (3, 0, 4, 2, 1)), (WORDS, 16))
                for parity in tl.static_range(2):
                    codes = _codes(words, slab % PLANES, parity, BITS, ASSEMBLY)
                    product = tl.dot(both[2 * slab + parity], codes, acc=product)
            of_queries, _ = _halved(product, 16)
            of_queries = of_queries * (scaling * 2.0 ** (24 - ROOM)) + offset[:, None]
            there = at + 16 * sub + unit < end
            logits += (tl.where(there[None, :], of_queries, float("-inf")),)
            highest = tl.maximum(highest, logits[sub])

        # Online softmax. The first step has a unit, so that what is subtracted is finite.
        higher = tl.maximum(base, tl.max(highest, 1) - LIFT)
        shrink = tl.exp2(base - higher)
        base = higher
        total = total * shrink[:, None]
        grown = ()  # type: tuple
        for i in tl.static_range(2 * SLABS):
            grown += (summed[i] * shrink[None, :],)
        summed = grown
        grown = ()
        for slab in tl.static_range(SLABS):
            grown += (lows[slab] * shrink[:, None],)
        lows = grown
        for sub in tl.static_range(SUBTILES):
            weights = tl.exp2(logits[sub] - base[:, None])
            total += weights
            grown = ()
            grown_lows = ()  # type: tuple
            for slab in tl.static_range(SLABS):
                words = v_words[sub * (BYTES // SPAN) + slab // PLANES]
                words = tl.reshape(words, (4, 8, 2, 2, WORDS // 8))
                words = tl.reshape(tl.permute(words, (4, 1, 2, 0, 3)), (WORDS, 16))
                scale = _entry(
                    v_scales[sub * TABLES + ENTRIES[slab] // PAIR], ENTRIES[slab] % PAIR, PAIR
                )
                low = _entry(
                    v_minima[sub * TABLES + ENTRIES[slab] // PAIR], ENTRIES[slab] % PAIR, PAIR
                )
                scaled = tl.trans((weights * scale[None, :]).to(tl.float16))
                for parity in tl.static_range(2):
                    codes = _codes(words, slab % PLANES, parity, BITS, ASSEMBLY)
                    grown += (tl.dot(codes, scaled, acc=summed[2 * slab + parity]),)
                grown_lows += (lows[slab] + weights * low[None, :],)
            summed = grown
            lows = grown_lows

        at, end, block = next_step(at, end, after, block, blocks, UNITS)

    in_all = tl.sum(total, 1)
    inverse = 1.0 / tl.where(in_all > 0.0, in_all, 1.0)
    at_state = leave_sum(states[1], tile, which, base, in_all, QUERIES)
    position = tl.arange(0, WORDS)
    word = position % 8 * (WORDS // 8) + position // 8
    for slab in tl.static_range(SLABS):
        start = slab % PLANES * BYTES + slab // PLANES * SPAN
        low = tl.sum(lows[slab], 1)
        for parity in tl.static_range(2):
            exact = summed[2 * slab + parity] * 2.0 ** (24 - slab % PLANES * BITS)
            mean = (exact + low[None, :]) * inverse[None, :]
            to = states[0] + at_state[None, :] * SIZE + (start + 2 * word + parity)[:, None]
            tl.store(to, mean, mask=(which < QUERIES)[None, :])


@triton.jit
def _halved(x, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The upper and the lower half of [16, N]."""
    return tl.split(tl.permute(tl.reshape(x, (2, 8, N)), (1, 2, 0)))


@triton.jit
def _codes(  # type: ignore[no-untyped-def]
    words, plane: tl.constexpr, parity: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """float16 code * 2**(plane * BITS - 24) of one plane and one byte of 16-bit words."""
    if ASSEMBLY is None:
        bits = (words.to(tl.int32) >> (8 * parity)) & (((1 << BITS) - 1) << (plane * BITS))
        x = bits.to(tl.int16).to(tl.float16, bitcast=True)
    else:
        x = tl.inline_asm_elementwise(
            ASSEMBLY[2 * plane + parity], "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    return x


@triton.jit
def _table(  # type: ignore[no-untyped-def]
    pairs, parity: tl.constexpr, WORDS: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """float16 [8, WORDS], in the order of the operand, of the low or high halves of what lanes have
    read of a table, [4, 8, WORDS // 16, 4]."""
    if ASSEMBLY is None:
        x = (pairs >> (16 * parity)).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        ASM: tl.constexpr = ASSEMBLY[len(ASSEMBLY) - 2 + parity]
        x = tl.inline_asm_elementwise(
            ASM, "=r,r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2
        )
    return tl.reshape(tl.permute(x, (1, 2, 0, 3)), (8, WORDS))


@triton.jit
def _entry(entry, half: tl.constexpr, PAIR: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 of float16 entries, or of one half of pairs of them."""
    if PAIR == 2:
        entry = (entry >> (16 * half)).to(tl.int16).to(tl.float16, bitcast=True)
    return entry.to(tl.float32)
