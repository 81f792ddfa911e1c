"""Keys and values of the scheme `rotated`: how the kernels take them, and in full precision again.

A unit is H x, with H a Hadamard matrix (orthonormal, symmetric: its own inverse), or H (x - mean)
for keys, the mean over its block. Its elements are scale * level[code], with a scale of its own. A
head size that is no power of two is cut into blocks of the largest that divides it, each rotated
for itself. No table of H is stored: its elements are signs, computed where they are needed.

N units of flat sequences, D head size, a multiple of 8.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from locret.kernels.dispatch import (
    INTERPRETED,
    check_tensors,
    on_device,
    padded,
    takes_triton,
    tl,
    triton,
)
from locret.kernels.packed import Packed, blocks_at, blocks_of, check_rows, is_wide, row_of

_UNITS = 64  # units that a program expands
_CHANNELS = 128  # channels of them that it rotates back


@dataclass(frozen=True)
class RotatedKV(Packed):
    """x = H (scale * level[code]), of keys plus their mean.

    Codes are planar as those of `PackedKV`; a code of 3 bits is in two planes, its lower 2 bits in
    the first D / 4 bytes, its highest in the D / 8 after them.

    Attributes:
        keys: codes uint8 [N, D * bits / 8], scale float16 [N, 1], mean bfloat16 [G, D].
        values: codes and scale like those of keys.
        key_levels, value_levels: the upper half of the 4, 8, 16 or 256 levels, ascending; the lower
            half mirrors them. 256 levels are code - 127.5.
        group: the most units of a block.
    """

    key_levels: tuple[float, ...]
    value_levels: tuple[float, ...]
    group: int

    def check(self, size: int) -> None:
        """Refuse what does not fit a head size."""
        check_rotated(self.keys, self.key_levels, (self.count, size), self.starts, "key_")
        check_rotated(self.values, self.value_levels, (self.count, size), None, "value_")

    def expanded(self, size: int) -> tuple[Tensor, Tensor]:
        """Keys and values float32 [N, D = size], in plain PyTorch."""
        keys = expand_rotated_reference(self.keys, self.key_levels, size, self.starts)
        return keys, expand_rotated_reference(self.values, self.value_levels, size)


def bits_of(levels: tuple[float, ...]) -> int:
    """Bits of a code for one of twice as many levels."""
    return len(levels).bit_length()


def chunk_of(size: int, bits: int) -> int:
    """Channels that have their codes, or the lower 2 bits of 3, in the same bits of their bytes."""
    return size * max(2, bits - bits % 2) // 8


def expand_rotated(
    packed: tuple[Tensor, ...],
    levels: tuple[float, ...],
    out: Tensor,
    starts: Tensor | None = None,
    at: Tensor | None = None,
) -> None:
    """Write H (scale * level[code]), of keys plus their mean, for N packed units.

    Args:
        packed, levels: `keys` or `values` of `RotatedKV`, and theirs.
        out, starts, at: as of `expand_units`.
    """
    count = packed[0].shape[0]
    size = check_rows(count, out, at)
    check_rotated(packed, levels, (count, size), starts)
    if not takes_triton(*packed, out, starts, at):
        out[slice(None) if at is None else at] = expand_rotated_reference(
            packed, levels, size, starts
        ).to(out.dtype)
    elif count:
        bits = bits_of(levels)
        upcast = INTERPRETED or is_wide(out)
        units = _UNITS // 4 if upcast else _UNITS
        channels = min(_CHANNELS // 2 if upcast else _CHANNELS, padded(size, least=16))
        with on_device(out):
            _expand[(triton.cdiv(count, units), triton.cdiv(size, channels))](
                *(tuple(packed), starts, out, at),
                *(count, 0 if starts is None else len(starts) - 1, out.stride()),
                SIZE=size,
                BITS=bits,
                LEVELS=levels if bits < 8 else (),
                CHANNELS=channels,
                CHUNK_BLOCK=padded(chunk_of(size, bits), least=16),
                UNITS=units,
                ASSEMBLY=None if upcast else assembly(levels),
                num_warps=8 if upcast else 4,
            )


def expand_rotated_reference(
    packed: tuple[Tensor, ...], levels: tuple[float, ...], size: int, starts: Tensor | None = None
) -> Tensor:
    """The twin of `expand_rotated`, in plain PyTorch: float32 [N, D = size]."""
    table = torch.tensor([-level for level in reversed(levels)] + list(levels))
    codes = _unpacked(packed[0], bits_of(levels), size)
    x = table.to(codes.device)[codes.int()] * packed[1].float() @ hadamard(size, codes.device)
    if starts is None:
        return x
    unit = torch.arange(len(codes), device=starts.device).int()
    return x + packed[2].float()[blocks_at(starts, unit)]


def hadamard(size: int, device: torch.device) -> Tensor:
    """H, float32 [size, size]."""
    part = torch.ones(1, 1, device=device)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device)
    while size % (2 * len(part)) == 0:
        part = torch.kron(part, pair)
    return torch.block_diag(*[part * len(part) ** -0.5] * (size // len(part)))


def _unpacked(packed: Tensor, bits: int, size: int) -> Tensor:
    if bits == 3:
        low, high = packed.split([size // 4, size // 8], 1)
        return _unpacked(low, 2, size) | _unpacked(high, 1, size) << 2
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)], 1)


def check_rotated(
    packed: tuple[Tensor, ...],
    levels: tuple[float, ...],
    shape: tuple[int, int],
    starts: Tensor | None,
    name: str = "",
) -> None:
    """Refuse what does not fit keys or values [N, D] = `shape`; arguments as of `expand_rotated`,
    `name` before what they are called in the error."""
    count, size = shape
    if len(levels) not in (2, 4, 8, 128) or size % 8:
        raise ValueError(
            f"{name}levels are {2 * len(levels)} and the head size is {size}; "
            "expected 4, 8, 16 or 256, and a multiple of 8"
        )
    codes, scale, mean = packed if starts is not None else (*packed, None)
    blocks = 0 if mean is None else len(mean)
    check_tensors(
        {
            f"{name}codes": (codes, torch.uint8, (count, size * bits_of(levels) // 8)),
            f"{name}scale": (scale, torch.float16, (count, 1)),
            f"{name}mean": (mean, torch.bfloat16, (blocks, size)),
            f"{name}starts": (starts, torch.int32, (blocks + 1,)),
        }
    )


@triton.jit(do_not_specialize=["count", "blocks"])
def _expand(  # type: ignore[no-untyped-def]
    packed, starts, out, rows, count, blocks, out_strides,
    SIZE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, CHANNELS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr, UNITS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = 8 // (BITS - BITS % 2)
    CHUNK: tl.constexpr = SIZE // CHUNKS
    first = tl.program_id(0) * UNITS
    unit = first + tl.arange(0, UNITS)
    there = unit < count
    byte = tl.arange(0, CHUNK_BLOCK)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = packed[0] + unit.to(tl.int64)[:, None] * (SIZE * BITS // 8)
    mask = there[:, None] & (byte < CHUNK)[None, :]
    codes = load_codes(at, byte[None, :], mask, BITS, CHUNK, ASSEMBLY)
    x = tl.zeros((UNITS, CHANNELS), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        level = levels_at(codes, chunk, BITS, LEVELS, ASSEMBLY)
        # Elements of H are 1 or -1 here, which float16 holds; what comes of padding is zero.
        channel = tl.where(byte < CHUNK, chunk * CHUNK + byte, -1)
        signs = hadamard_at(channel[:, None], d[None, :], SIZE).to(level.dtype)
        x = tl.dot(level, signs, acc=x, input_precision="ieee")
    scale = tl.load(packed[1] + unit, mask=there, other=0.0).to(tl.float32)
    x *= scale[:, None] * (SIZE & -SIZE) ** -0.5
    mask = there[:, None] & (d < SIZE)[None, :]
    if starts is not None:
        block = blocks_of(starts, first, UNITS, blocks).to(tl.int64)
        mean = tl.load(packed[2] + block[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
        x += mean.to(tl.float32)
    at = out + row_of(rows, unit, there)[:, None] * out_strides[0] + d[None, :] * out_strides[1]
    tl.store(at, x.to(out.dtype.element_ty), mask=mask)


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
        if BITS == 3:
            code = (codes[0].to(tl.int32) >> (2 * chunk)) & 3
            code += ((codes[1].to(tl.int32) >> (2 * chunk)) & 1) << 2
        else:
            code = (codes[0].to(tl.int32) >> (chunk * BITS)) & ((1 << BITS) - 1)
        x = level_of(code, BITS, LEVELS)
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
def assembly(levels: tuple[float, ...]) -> tuple[str, ...]:
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
    chunks = 8 // (bits - bits % 2)
    looked_up = tuple(
        "{ .reg .b32 code, low, high, sign; "
        + " ".join((*_code(bits, chunk), *_lookup(levels), *_signed(bits)))
        + " prmt.b32 $0, low, high, 0x5140; prmt.b32 $1, low, high, 0x7362; }"
        for chunk in range(chunks)
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


def table_of(levels: tuple[float, ...]) -> np.ndarray:
    """uint32 [2, 2], the low and the high bytes of eight levels in float16: of 16 levels those of
    the upper half; zero where there are but four."""
    halves = np.zeros(8, np.float16)
    if len(levels) <= 8:
        table = levels if len(levels) == 8 else (*(-level for level in reversed(levels)), *levels)
        halves[: len(table)] = table
    return halves.view(np.uint8).reshape(8, 2).T.copy().view("<u4")


def _lookup(levels: tuple[float, ...]) -> tuple[str, ...]:
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
