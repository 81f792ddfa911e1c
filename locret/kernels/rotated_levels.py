"""Units of the scheme `rotated` in registers: from codes to levels, and by the matrix H.

Levels are looked up in two ways. `levels_at` gives those of one chunk of channels, the ones whose
codes are in the same bits of their bytes, and fits any layout: a product of blocks lays them out as
it likes. `key_levels` and `value_levels` give those of all chunks at once in the lanes where the
operand of a tensor core has them. There a word of 32 bits has four bytes, each with the codes of 4,
2 or 1 chunks; of 3 bits another word has the highest ones, of both halves of the chunks in turn.
Eight codes at a time become the nibbles of one word, by which `prmt` looks bytes up in a table of
eight: the low ones of float16, then the high ones. So an element of 3 bits costs one and a half
instructions.

Levels are given by their upper half, ascending; the lower half mirrors them. 256 levels are
code - 127.5. D head size.
"""

import functools

import numpy as np

from locret.kernels.dispatch import tl, triton

Levels = tuple[float, ...]
_SELECT = "0xE4"  # lop3: bits of the first operand where the third has ones, else of the second


def bits_of(levels: Levels) -> int:
    """Bits of a code for one of twice as many levels."""
    return len(levels).bit_length()


def chunks_of(bits: int) -> int:
    """Chunks of channels that have their codes, or the lower 2 bits of 3, in the same bytes."""
    return 8 // (bits - bits % 2)


def table_of(levels: Levels) -> np.ndarray:
    """uint32 [2, 2], the low and the high bytes of eight levels in float16: of 16 levels those of
    the upper half; zero where there are but four."""
    halves = np.zeros(8, np.float16)
    if len(levels) <= 8:
        table = levels if len(levels) == 8 else (*(-level for level in reversed(levels)), *levels)
        halves[: len(table)] = table
    return halves.view(np.uint8).reshape(8, 2).T.copy().view("<u4")


@triton.jit
def hadamard_at(i, j, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 elements of H, times the root of the size of its blocks; zero where `i` is -1."""
    BLOCK: tl.constexpr = SIZE & -SIZE
    both = i & j & (BLOCK - 1)
    both ^= both >> 8
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    same = i // BLOCK == j // BLOCK
    return tl.where(same & (i >= 0), 1.0 - 2.0 * (both & 1).to(tl.float32), 0.0)


@triton.jit
def turned(x, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
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


@triton.jit
def load_codes(  # type: ignore[no-untyped-def]
    at, byte, mask, BITS: tl.constexpr, CHUNK: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """The bytes with the codes of units, which begin at `at`; for 3 bits also those with the
    highest bits, moved so that bit 2 * c is that of chunk c."""
    codes = (tl.load(at + byte, mask=mask, other=0),)  # type: tuple
    if BITS == 3:
        # A byte has those of eight channels: of two in each chunk, CHUNK / 2 apart.
        HALF: tl.constexpr = CHUNK // 2
        high = tl.load(at + CHUNK + byte % HALF, mask=mask, other=0)
        if ASSEMBLY is None:
            high = tl.where(byte < HALF, high, high >> 1)
        else:
            ASM: tl.constexpr = ASSEMBLY[len(ASSEMBLY) - 1]
            high = tl.inline_asm_elementwise(
                ASM,
                "=r,r,r",
                [high, tl.where(byte < HALF, -1, 0).to(tl.int8)],
                dtype=tl.uint8,
                is_pure=True,
                pack=4,
            )
        codes += (high,)
    return codes


@triton.jit
def levels_at(  # type: ignore[no-untyped-def]
    codes, chunk: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """The levels of one chunk of channels, of what `load_codes` read: float16 by `ASSEMBLY`,
    float32 by plain arithmetic where that is None."""
    if ASSEMBLY is not None:
        if BITS == 3:
            x = tl.inline_asm_elementwise(
                ASSEMBLY[chunk],
                "=r,=r,r,r",
                [codes[0], codes[1]],
                dtype=tl.float16,
                is_pure=True,
                pack=4,
            )
        else:
            x = tl.inline_asm_elementwise(
                ASSEMBLY[chunk], "=r,=r,r", [codes[0]], dtype=tl.float16, is_pure=True, pack=4
            )
    else:
        high = codes[len(codes) - 1].to(tl.int32)
        x = _level(codes[0].to(tl.int32), high, 0, chunk, BITS, LEVELS)
    return x


@triton.jit
def level_of(code, BITS: tl.constexpr, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 levels of codes, int32, by plain arithmetic."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    if BITS == 8:
        x = code.to(tl.float32) - 127.5
    else:
        step = tl.where(code < HALF, HALF - 1 - code, code - HALF)
        x = tl.zeros(code.shape, tl.float32)
        for i in tl.static_range(HALF):
            x = tl.where(step == i, LEVELS[i], x)
        x = tl.where(code < HALF, -x, x)
    return x


@functools.cache
def chunk_assembly(levels: Levels) -> tuple[str, ...]:
    """For each chunk of channels, PTX that makes four float16 levels ($0, $1) of four bytes ($2).

    Of 3 bits, the bytes with the highest ones are $3; after the chunks comes PTX that moves each of
    four such bytes ($1) by a bit, but where a mask ($2) says that it stays.
    """
    bits = bits_of(levels)
    if bits == 8:
        # 0x6400 is 1024 in float16 and its last bits count by one; 0x57f8 is 127.5.
        return (
            """{
            .reg .b32 low, high, base, middle;
            mov.b32 base, 0x64006400;
            mov.b32 middle, 0x57f857f8;
            prmt.b32 low, $2, base, 0x7150;
            prmt.b32 high, $2, base, 0x7352;
            sub.f16x2 low, low, base;
            sub.f16x2 high, high, base;
            sub.f16x2 $0, low, middle;
            sub.f16x2 $1, high, middle;
            }""",
        )
    looked_up = tuple(
        "{ .reg .b32 code, low, high, sign; "
        + " ".join((*_code(bits, chunk), *_looked_up(levels), *_signed(bits)))
        + " prmt.b32 $0, low, high, 0x5140; prmt.b32 $1, low, high, 0x7362; }"
        for chunk in range(chunks_of(bits))
    )
    # The bit that comes from the next byte is of no chunk.
    moved = "{ .reg .b32 next; shr.b32 next, $1, 1; lop3.b32 $0, $2, $1, next, 0xCA; }"
    return looked_up if bits != 3 else (*looked_up, moved)


def _code(bits: int, chunk: int) -> tuple[str, ...]:
    """PTX that puts the codes of a chunk into `code`, a byte each; of 4 bits, what the level's size
    is looked up by, and 8 in a byte of `sign` where it is negative."""
    if bits == 3:
        return (
            f"shr.b32 code, $2, {2 * chunk};",
            f"shr.b32 high, $3, {2 * chunk - 2};" if chunk else "shl.b32 high, $3, 2;",
            "and.b32 high, high, 0x04040404;",
            "lop3.b32 code, code, 0x03030303, high, 0xEA;",
        )
    shift = f"shr.b32 code, $2, {chunk * bits};"
    if bits == 2:
        return shift, "and.b32 code, code, 0x03030303;"
    return (
        shift,
        "lop3.b32 sign, code, 0x08080808, 0, 0x0C;",
        # 7 in the bytes of codes below 8, which count from the middle downwards.
        *("shr.b32 low, sign, 3;", "sub.u32 low, sign, low;"),
        "lop3.b32 code, code, low, 0x07070707, 0x28;",
    )


def _looked_up(levels: Levels) -> tuple[str, ...]:
    """PTX that looks the low and the high bytes of four float16 numbers up: `prmt` is a table of
    eight bytes."""
    low, high = table_of(levels)
    return (
        # Four nibbles that follow each other choose four bytes.
        *("shr.b32 low, code, 4;", "or.b32 code, code, low;", "prmt.b32 code, code, 0, 0x4420;"),
        *(f"mov.b32 low, {low[0]:#010x};", f"mov.b32 high, {low[1]:#010x};"),
        "prmt.b32 low, low, high, code;",
        *(f"mov.b32 $0, {high[0]:#010x};", f"mov.b32 $1, {high[1]:#010x};"),
        "prmt.b32 high, $0, $1, code;",
    )


def _signed(bits: int) -> tuple[str, ...]:
    """PTX that gives negative levels their sign, where the table does not."""
    return ("shl.b32 sign, sign, 4;", "xor.b32 high, high, sign;") if bits == 4 else ()


# ---- in the lanes of a tensor core ---------------------------------------------------------------


@functools.cache
def key_assembly(levels: Levels) -> tuple[str, str, str]:
    """PTX, its operands and PTX of its tables (`_tables`). For each chunk it gives the levels of
    bytes 0 and 1 of four and of 2 and 3; it takes these bytes, those with the highest bits and by
    how much those are shifted."""
    bits = bits_of(levels)
    count = 2 * chunks_of(bits)
    codes, high, shift, *table = (f"${count + i}" for i in range(8))
    body = [f"mov.b32 code, {codes};"]
    if bits == 3:
        body += [f"shf.r.wrap.b32 top, {high}, 0, {shift};", "and.b32 top, top, 0x55555555;"]
    body += _levels(bits, [f"${i}" for i in range(count)], table)
    return _assembled(body, count, 8, levels)


@functools.cache
def value_assembly(levels: Levels, size: int) -> tuple[str, str, str]:
    """PTX, its operands and PTX of its tables (`_tables`). For each chunk and byte it gives the
    levels of two units; it takes four bytes of either unit, those with the highest bits of either,
    by how much those are shifted and, for a head size of which a lane has but two of the four
    bytes, which two."""
    bits = bits_of(levels)
    chunks = chunks_of(bits)
    each = min(4, size // chunks // 8)
    count = chunks * each
    one, two, high_one, high_two, shift, pick, *table = (f"${count + i}" for i in range(11))
    body = []
    for pair in range(each // 2):
        which = ("0x5140", "0x7362")[pair]
        if each == 2:
            which = "which"
            body += [f"mad.lo.u32 which, {pick}, 0x2222, 0x5140;"]
        body += [f"prmt.b32 code, {one}, {two}, {which};"]
        if bits == 3:
            body += [
                f"prmt.b32 top, {high_one}, {high_two}, {which};",
                f"shf.r.wrap.b32 top, top, 0, {shift};",
                "and.b32 top, top, 0x55555555;",
            ]
        outputs = [f"${each * c + 2 * pair + i}" for c in range(chunks) for i in range(2)]
        body += _levels(bits, outputs, table)
    return _assembled(body, count, 11, levels)


def _assembled(body: list[str], results: int, given: int, levels: Levels) -> tuple[str, str, str]:
    names = "code, top, index, part, sign, low, high, which"
    block = f"{{ .reg .b32 {names}; " + " ".join(body) + " }"
    return block, ",".join(["=&r"] * results + ["r"] * given), _tables(levels)


def _tables(levels: Levels) -> str:
    """PTX of five words: `table_of` the levels, and 0x40 four times.

    A bit that is never set keeps them in registers of each lane. In those that all lanes share
    they would be copied before each use.
    """
    words = [*table_of(levels).flatten(), 0x40404040]
    body = ["mov.u32 never, %lanemask_lt; mov.u32 lane, %lanemask_eq; and.b32 never, never, lane;"]
    body += [f"or.b32 ${i}, never, {word:#010x};" for i, word in enumerate(words)]
    return "{ .reg .b32 never, lane; " + " ".join(body) + " }"


def _levels(bits: int, outputs: list[str], table: list[str]) -> list[str]:
    """PTX that writes two levels of each chunk of `code` to each of the outputs: of its lower
    bytes, and of its higher ones; `table` as of `_tables`."""
    if bits == 8:
        # 0x6400 is 1024 in float16 and its last bits count by one; 0x57f8 is 127.5.
        return [
            line
            for out, order in zip(outputs, ("0x4140", "0x4342"), strict=True)
            for line in (
                f"prmt.b32 low, code, 0x64646464, {order};",
                "mov.b32 part, 0x64006400; mov.b32 sign, 0x57f857f8;",
                f"sub.f16x2 low, low, part; sub.f16x2 {out}, low, sign;",
            )
        ]
    if bits == 4:
        return _indices_of_4() + _lookup(outputs, table, True)
    body = []
    for first in range(2):
        body += _indices(bits, first)
        body += _lookup([outputs[2 * first + i] for i in (0, 1, 4, 5)], table, False)
    return body


def _indices(bits: int, first: int) -> list[str]:
    """PTX that makes nibbles of the codes of two chunks, `first` and two after it."""
    shifted = ["shr.b32 part, code, 2;"] if first else []
    part = "part" if first else "code"
    if bits == 2:
        return [*shifted, f"and.b32 index, {part}, 0x33333333;"]
    if first:
        return [*shifted, f"lop3.b32 index, part, top, 0x33333333, {_SELECT};"]
    return ["shl.b32 index, top, 2;", f"lop3.b32 index, code, index, 0x33333333, {_SELECT};"]


def _indices_of_4() -> list[str]:
    """PTX that makes what levels' sizes are looked up by of nibbles: from 8 on they count from the
    middle upwards, below it downwards."""
    return [
        "and.b32 part, code, 0x88888888;",
        "shr.b32 sign, part, 3;",
        "sub.u32 part, part, sign;",
        "lop3.b32 index, code, part, 0x77777777, 0x82;",
    ]


def _lookup(outputs: list[str], table: list[str], signed: bool) -> list[str]:
    """PTX that looks eight levels up: those of the first of two chunks go to the first two outputs,
    of its lower bytes and of its higher ones, those of the second chunk to the others."""
    body = []
    for i in range(2):
        if i:
            body += ["shr.b32 index, index, 16;"]
        body += [f"prmt.b32 low, {table[0]}, {table[1]}, index;"]
        body += [f"prmt.b32 high, {table[2]}, {table[3]}, index;"]
        if signed:
            # Zero, the sign of a byte of the table, where the nibble is 8 or more, else 0x40.
            body += ["shr.b32 code, code, 16;"] if i else []
            body += [f"prmt.b32 sign, {table[4]}, {table[4]}, code;"]
            body += ["shl.b32 sign, sign, 1;", "xor.b32 high, high, sign;"]
        body += [f"prmt.b32 {outputs[i]}, low, high, 0x6240;"]
        body += [f"prmt.b32 {outputs[2 + i]}, low, high, 0x7351;"]
    return body


@triton.jit
def table_words(ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tables that levels are looked up in, a register each."""
    tables = (0, 0, 0, 0, 0)
    if ASSEMBLY is not None:
        tables = tl.inline_asm_elementwise(
            ASSEMBLY[2],
            "=r,=r,=r,=r,=r,r",
            [tl.zeros((1, 1, 1, 1), tl.int32)],
            dtype=(tl.int32,) * 5,
            is_pure=True,
            pack=1,
        )
    return tables


@triton.jit
def key_levels(  # type: ignore[no-untyped-def]
    given, tables, BITS: tl.constexpr, LEVELS: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """float16 levels of each chunk and each byte: `given` are 32-bit words of a unit, those with
    the highest bits and by how much these are shifted."""
    CHUNKS: tl.constexpr = 8 // (BITS - BITS % 2)
    if ASSEMBLY is None:
        levels = ()  # type: tuple
        for i in tl.static_range(4 * CHUNKS):
            x = _level(given[0], given[1] >> given[2], i % 4, i // 4, BITS, LEVELS)
            levels += (x.to(tl.float16),)
    else:
        pairs = tl.inline_asm_elementwise(
            ASSEMBLY[0],
            ASSEMBLY[1],
            [given[0], given[1], given[2]]
            + [tables[0], tables[1], tables[2], tables[3], tables[4]],
            dtype=(tl.int32,) * (2 * CHUNKS),
            is_pure=True,
            pack=1,
        )
        levels = _halves(pairs, 2 * CHUNKS)
    return levels


@triton.jit
def value_levels(  # type: ignore[no-untyped-def]
    given, tables,
    BYTES: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """float16 levels of each chunk, byte and unit: `given` are 32-bit words of one unit and of
    another one, those with the highest bits of both, by how much these are shifted and, of 2 BYTES
    that count, which."""
    CHUNKS: tl.constexpr = 8 // (BITS - BITS % 2)
    if ASSEMBLY is None:
        levels = ()  # type: tuple
        skip = 16 * given[5] if BYTES == 2 else 0
        for i in tl.static_range(2 * BYTES * CHUNKS):
            high = given[2 + i % 2] >> given[4]
            x = _level(
                given[i % 2] >> skip, high >> skip, i // 2 % BYTES, i // 2 // BYTES, BITS, LEVELS
            )
            levels += (x.to(tl.float16),)
    else:
        units = [given[0], given[1], given[2], given[3], given[4], given[5]]
        pairs = tl.inline_asm_elementwise(
            ASSEMBLY[0],
            ASSEMBLY[1],
            units + [tables[0], tables[1], tables[2], tables[3], tables[4]],
            dtype=(tl.int32,) * (BYTES * CHUNKS),
            is_pure=True,
            pack=1,
        )
        levels = _halves(pairs, BYTES * CHUNKS)
    return levels


@triton.jit
def _halves(pairs, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lower and the upper float16 of each 32-bit word."""
    halves = ()  # type: tuple
    for i in tl.static_range(COUNT):
        halves += (pairs[i].to(tl.int16).to(tl.float16, bitcast=True),)
        halves += ((pairs[i] >> 16).to(tl.int16).to(tl.float16, bitcast=True),)
    return halves


@triton.jit
def _level(  # type: ignore[no-untyped-def]
    word, high, byte: tl.constexpr, chunk: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr
):
    """float32 levels of one byte of 32-bit words, by plain arithmetic."""
    if BITS == 3:
        code = (word >> (8 * byte + 2 * chunk)) & 3
        code += ((high >> (8 * byte + 2 * chunk)) & 1) << 2
    else:
        code = (word >> (8 * byte + BITS * chunk)) & ((1 << BITS) - 1)
    return level_of(code, BITS, LEVELS)
