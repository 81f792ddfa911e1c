"""Levels of the scheme `rotated` from its codes, in the registers of a tensor core's operand.

A word of 32 bits has four bytes, each with the codes of 4, 2 or 1 chunks of channels; of 3 bits
another word has the highest ones, of both halves of the chunks in turn. Eight codes at a time
become the nibbles of one word, by which `prmt` looks bytes up in a table of eight: the low ones of
float16, then the high ones. So an element of 3 bits costs one and a half instructions.
"""

import functools

from locret.kernels.dispatch import tl, triton
from locret.kernels.packed_rotated import bits_of, level_of, table_of

Levels = tuple[float, ...]
_SELECT = "0xE4"  # lop3: bits of the first operand where the third has ones, else of the second


@functools.cache
def key_assembly(levels: Levels) -> tuple[str, str, str]:
    """PTX, its operands and PTX of its tables (`_tables`). For each chunk it gives the levels of
    bytes 0 and 1 of four and of 2 and 3; it takes these bytes, those with the highest bits and by
    how much those are shifted."""
    bits = bits_of(levels)
    count = 2 * _chunks(bits)
    codes, high, shift, *table = (f"${count + i}" for i in range(8))
    body = [f"mov.b32 code, {codes};"]
    if bits == 3:
        body += [f"shf.r.wrap.b32 top, {high}, 0, {shift};", "and.b32 top, top, 0x55555555;"]
    body += _levels(bits, [f"${i}" for i in range(count)], table)
    return _block(body), _operands(count, 8), _tables(levels)


@functools.cache
def value_assembly(levels: Levels, size: int) -> tuple[str, str, str]:
    """PTX, its operands and PTX of its tables (`_tables`). For each chunk and byte it gives the
    levels of two units; it takes four bytes of either unit, those with the highest bits of either,
    by how much those are shifted and, for a head size of which a lane has but two of the four
    bytes, which two."""
    bits = bits_of(levels)
    chunks = _chunks(bits)
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
    return _block(body), _operands(count, 11), _tables(levels)


def _operands(results: int, given: int) -> str:
    return ",".join(["=&r"] * results + ["r"] * given)


def _chunks(bits: int) -> int:
    return 8 // (bits - bits % 2)


def _block(body: list[str]) -> str:
    names = "code, top, index, part, sign, low, high, which"
    return f"{{ .reg .b32 {names}; " + " ".join(body) + " }"


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
            levels += (_level(given[0], given[1] >> given[2], i % 4, i // 4, BITS, LEVELS),)
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
            levels += (x,)
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
    """float16 levels of one byte of 32-bit words, by plain arithmetic."""
    if BITS == 3:
        code = (word >> (8 * byte + 2 * chunk)) & 3
        code += ((high >> (8 * byte + 2 * chunk)) & 1) << 2
    else:
        code = (word >> (8 * byte + BITS * chunk)) & ((1 << BITS) - 1)
    return level_of(code, BITS, LEVELS).to(tl.float16)
