"""Keys and values of a few bits: how the kernels take them, and in full precision again.

KIVI (arXiv 2402.02750): keys per channel of a block of units, values per unit and group of
channels. A chunk of a prompt attends to a layer that was expanded for it, one launch a tensor.
Products of a scale (float16) and a code are exact in float32, so that the kernel rounds once for
the sum and once for the output, as its twin does: both give the same bits. That holds of 8-bit
floats (`E4M3`) too: a code has 4 significant bits and a scale 11.

`rotated`: a unit is H x, with H a Hadamard matrix (orthonormal, symmetric: its own inverse), or
H (x - mean) for keys, the mean over its block. Its elements are scale * level[code], with a scale
of its own. A head size that is no power of two is cut into blocks of the largest that divides it,
each rotated for itself. No table of H is stored: its elements are signs, computed where they are
needed.

N units of flat sequences, G blocks, D head size, of `rotated` a multiple of 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locret.kernels.dispatch import (
    INTERPRETED,
    blocks_of,
    check_tensors,
    on_device,
    padded,
    row_of,
    takes_triton,
    tl,
    triton,
)
from locret.kernels.rotated_levels import (
    Levels,
    bits_of,
    chunk_assembly,
    chunks_of,
    hadamard_at,
    levels_at,
    load_codes,
)

E4M3 = 0
"""Instead of a number of bits: codes are 8-bit floats, x = scale * code, and of keys plus a mean in
place of a minimum; values have one scale a unit: their group is the head size."""

_ELEMENTS = 4096  # codes' bytes that a program expands
_UNITS = 128  # most units whose codes these are
_ROTATED_UNITS = 64  # units that a program rotates back
_CHANNELS = 128  # most channels of them that it makes of one product


@dataclass(frozen=True)
class Packed:
    """Keys and values of N units, sequence by sequence. All tensors are contiguous.

    Attributes:
        keys: tensors of units [N, any] and, after them, tables [G, D], an entry for each block.
        starts: int32 [G + 1]; block i is the units starts[i] <= u < starts[i + 1]. The first start
            is 0, the last N; no block is empty, none crosses a sequence's border.
        values: tensors of units [N, any].
    """

    keys: tuple[Tensor, ...]
    starts: Tensor
    values: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """N."""
        return self.keys[0].shape[0]


@dataclass(frozen=True)
class PackedKV(Packed):
    """x = minimum + scale * code.

    Codes are planar: of the M = ceil(D * bits / 8) bytes of a unit, bits [i * bits, (i + 1) * bits)
    of byte j are channel i * M + j.

    Attributes:
        keys: codes uint8 [N, M], scale and minimum float16 [G, D].
        values: codes uint8 [N, M], scale and minimum float16 [N, ceil(D / group)].
        bits: 8, 4 or 2.
        group: channels that share a scale of a value, and the most units of a block.
    """

    bits: int
    group: int

    def check(self, size: int) -> None:
        """Refuse what does not fit a head size."""
        how = (self.bits, self.group, (self.count, size))
        check_packed(self.keys, *how, self.starts, "key_")
        check_packed(self.values, *how, None, "value_")

    def expanded(self, size: int) -> tuple[Tensor, Tensor]:
        """Keys and values float32 [N, D = size], in plain PyTorch."""
        how = (self.bits, self.group, size)
        keys = expand_units_reference(self.keys, *how, self.starts)
        return keys, expand_units_reference(self.values, *how)


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

    key_levels: Levels
    value_levels: Levels
    group: int

    def check(self, size: int) -> None:
        """Refuse what does not fit a head size."""
        check_rotated(self.keys, self.key_levels, (self.count, size), self.starts, "key_")
        check_rotated(self.values, self.value_levels, (self.count, size), None, "value_")

    def expanded(self, size: int) -> tuple[Tensor, Tensor]:
        """Keys and values float32 [N, D = size], in plain PyTorch."""
        keys = expand_rotated_reference(self.keys, self.key_levels, size, self.starts)
        return keys, expand_rotated_reference(self.values, self.value_levels, size)


def blocks_at(starts: Tensor, unit: Tensor) -> Tensor:
    """The block of each unit (int32, any shape), long; the last block for what comes after all."""
    return torch.searchsorted(starts[1:], unit, right=True).clamp(max=len(starts) - 2)


def expand_units(
    packed: Sequence[Tensor],
    bits: int,
    group: int,
    out: Tensor,
    starts: Tensor | None = None,
    at: Tensor | None = None,
) -> None:
    """Write minimum + scale * code, for the keys or the values of N packed units.

    Args:
        packed, bits, group: `keys` or `values` of `PackedKV`, and how they are packed; or `E4M3`
            for bits. Values without minima have none.
        out: [R, D], floating, any strides.
        starts: of the blocks of keys; None = these are values.
        at: long [N], the row of `out` that each unit goes to; no two to one row. All must be
            below R: this cannot be checked without waiting for the device. None = all R = N rows,
            in order.
    """
    count = packed[0].shape[0]
    size = check_rows(count, out, at)
    check_packed(packed, bits, group, (count, size), starts)
    if not takes_triton(*packed, out, starts, at):
        out[slice(None) if at is None else at] = expand_units_reference(
            packed, bits, group, size, starts
        ).to(out.dtype)
    elif count:
        byte_block = padded(packed[0].shape[1])
        units = min(_UNITS, max(1, _ELEMENTS // byte_block))
        with on_device(out):
            _expand[(triton.cdiv(count, units),)](
                *(tuple(packed), starts, out, at),
                *(count, 0 if starts is None else len(starts) - 1, out.stride()),
                SIZE=size,
                BITS=bits or 8,
                GROUP=group,
                FLOATS=bits == E4M3,
                LOW=len(packed) > 2,
                BYTE_BLOCK=byte_block,
                UNITS=units,
                num_warps=4,
            )


def expand_units_reference(
    packed: Sequence[Tensor], bits: int, group: int, size: int, starts: Tensor | None = None
) -> Tensor:
    """The twin of `expand_units`, in plain PyTorch: float32 [N, D = size]."""
    codes, *tables = packed
    if bits == E4M3:
        x = codes.view(torch.float8_e4m3fn).float()
    else:
        planes = [(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        x = torch.cat(planes, dim=-1)[:, :size].float()
    if starts is None:
        channel = torch.arange(size, device=codes.device) // group
        scale, *low = (table[:, channel].float() for table in tables)
    else:
        block = blocks_at(starts, torch.arange(len(codes), device=starts.device).int())
        scale, *low = (table[block].float() for table in tables)
    return low[0] + scale * x if low else scale * x


def check_rows(count: int, out: Tensor, at: Tensor | None) -> int:
    """D, of an `out` [R, D] that takes `count` units; arguments as of `expand_units`."""
    if not out.is_floating_point() or out.dim() != 2 or (at is None and len(out) != count):
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}; expected a floating type and "
            f"[{'rows' if at is not None else count}, head size]"
        )
    check_tensors({"at": (at, torch.long, (count,))})
    return out.shape[1]


def check_packed(
    packed: Sequence[Tensor],
    bits: int,
    group: int,
    shape: Sequence[int],
    starts: Tensor | None,
    name: str = "",
) -> None:
    """Refuse what does not fit keys or values [N, D] = `shape`; arguments as of `expand_units`,
    `name` before what they are called in the error."""
    if bits not in (E4M3, 2, 4, 8):
        raise ValueError(f"bits is {bits}; expected 2, 4 or 8")
    (codes, scale, *low), (count, size) = packed, shape
    table = (count, -(-size // group)) if starts is None else (len(scale), size)
    check_tensors(
        {
            f"{name}codes": (codes, torch.uint8, (count, -(-size * (bits or 8) // 8))),
            f"{name}scale": (scale, torch.float16, table),
            f"{name}minimum": (low[0] if low else None, torch.float16, table),
            f"{name}starts": (starts, torch.int32, (len(scale) + 1,)),
        }
    )


def is_wide(query: Tensor) -> bool:
    """Whether units are expanded to float32, for precision or where assembly, NVIDIA's, is not."""
    return query.dtype == torch.float32 or torch.version.hip is not None


@triton.jit(do_not_specialize=["count", "blocks"])
def _expand(  # type: ignore[no-untyped-def]
    packed, starts, out, rows, count, blocks, out_strides,
    SIZE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLOATS: tl.constexpr,
    LOW: tl.constexpr, BYTE_BLOCK: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = (SIZE * BITS + 7) // 8
    first = tl.program_id(0) * UNITS
    unit = first + tl.arange(0, UNITS)
    there = unit < count
    if starts is not None:
        entry = blocks_of(starts, first, UNITS, blocks).to(tl.int64)[:, None] * SIZE
    else:
        entry = unit.to(tl.int64)[:, None] * tl.cdiv(SIZE, GROUP)
    at_out = row_of(rows, unit, there)[:, None] * out_strides[0]
    byte = tl.arange(0, BYTE_BLOCK)
    in_bytes = there[:, None] & (byte < BYTES)[None, :]
    at = unit.to(tl.int64)[:, None] * BYTES + byte[None, :]
    bits = tl.load(packed[0] + at, mask=in_bytes, other=0).to(tl.int32)
    for plane in tl.static_range(8 // BITS):
        channel = (plane * BYTES + byte)[None, :]
        mask = in_bytes & (channel < SIZE)
        d = channel if starts is not None else channel // GROUP
        if LOW:
            step = tl.load(packed[1] + entry + d, mask=mask, other=0.0)
        else:
            step = tl.load(packed[1] + entry, mask=there[:, None], other=0.0)
        if FLOATS:
            # With three bits of exponent more in front these are the bits of a float16, 2 ** 8
            # times as small, numbers below the normal ones included; not every GPU knows e4m3.
            half = ((bits & 128) << 8) | ((bits & 127) << 7)
            code = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        else:
            code = ((bits >> (plane * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        x = step.to(tl.float32) * code
        if LOW:
            low = tl.load(packed[2] + entry + d, mask=mask, other=0.0)
            x = low.to(tl.float32) + x
        at = out + at_out + channel * out_strides[1]
        tl.store(at, x.to(out.dtype.element_ty), mask=mask)


def expand_rotated(
    packed: tuple[Tensor, ...],
    levels: Levels,
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
        units = _ROTATED_UNITS // 4 if upcast else _ROTATED_UNITS
        channels = min(_CHANNELS // 2 if upcast else _CHANNELS, padded(size, least=16))
        split = size & -size == size and size // chunks_of(bits) <= channels
        programs = 1 if split else triton.cdiv(size, channels)
        with on_device(out):
            _rotate_back[(triton.cdiv(count, units), programs)](
                *(tuple(packed), starts, out, at),
                *(count, 0 if starts is None else len(starts) - 1, out.stride()),
                SIZE=size,
                BITS=bits,
                LEVELS=levels if bits < 8 else (),
                CHANNELS=channels,
                CHUNK_BLOCK=padded(size // chunks_of(bits), least=16),
                UNITS=units,
                SPLIT=split,
                ASSEMBLY=None if upcast else chunk_assembly(levels),
                num_warps=8 if upcast else 4,
            )


def expand_rotated_reference(
    packed: tuple[Tensor, ...], levels: Levels, size: int, starts: Tensor | None = None
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
    levels: Levels,
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
def _rotate_back(  # type: ignore[no-untyped-def]
    packed, starts, out, rows, count, blocks, out_strides,
    SIZE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, CHANNELS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = 8 // (BITS - BITS % 2)
    CHUNK: tl.constexpr = SIZE // CHUNKS
    first = tl.program_id(0) * UNITS
    unit = first + tl.arange(0, UNITS)
    there = unit < count
    byte = tl.arange(0, CHUNK_BLOCK)
    at = packed[0] + unit.to(tl.int64)[:, None] * (SIZE * BITS // 8)
    mask = there[:, None] & (byte < CHUNK)[None, :]
    codes = load_codes(at, byte[None, :], mask, BITS, CHUNK, ASSEMBLY)
    scale = tl.load(packed[1] + unit, mask=there, other=0.0).to(tl.float32)
    scale *= (SIZE & -SIZE) ** -0.5
    at_out = out + row_of(rows, unit, there)[:, None] * out_strides[0]
    block = unit.to(tl.int64)
    if starts is not None:
        block = blocks_of(starts, first, UNITS, blocks).to(tl.int64)
    to = (at_out, out_strides[1], packed, starts, block, scale, there)
    # Elements of H are 1 or -1 here, which float16 holds; what comes of padding is zero.
    if SPLIT:
        # H is a product of two: within a chunk of channels, and among chunks.
        signs = hadamard_at(tl.where(byte < CHUNK, byte, -1)[:, None], byte[None, :], CHUNK)
        x = ()  # type: tuple
        for chunk in tl.static_range(CHUNKS):
            level = levels_at(codes, chunk, BITS, LEVELS, ASSEMBLY)
            x += (tl.dot(level, signs.to(level.dtype), input_precision="ieee"),)
        if CHUNKS == 4:
            x = (x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3])
            x = (x[0] + x[2], x[1] + x[3], x[0] - x[2], x[1] - x[3])
        elif CHUNKS == 2:
            x = (x[0] + x[1], x[0] - x[1])
        for chunk in tl.static_range(CHUNKS):
            _write(x[chunk], to, chunk * CHUNK + byte, byte < CHUNK, SIZE)
    else:
        d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        y = tl.zeros((UNITS, CHANNELS), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            level = levels_at(codes, chunk, BITS, LEVELS, ASSEMBLY)
            channel = tl.where(byte < CHUNK, chunk * CHUNK + byte, -1)
            signs = hadamard_at(channel[:, None], d[None, :], SIZE).to(level.dtype)
            y = tl.dot(level, signs, acc=y, input_precision="ieee")
        _write(y, to, d, d < SIZE, SIZE)


@triton.jit
def _write(x, to, d, those, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale units, add their means, and store `those` of the channels `d`."""
    at_out, stride, packed, starts, block, scale, there = to
    mask = there[:, None] & those[None, :]
    x *= scale[:, None]
    if starts is not None:
        mean = tl.load(packed[2] + block[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
        x += mean.to(tl.float32)
    tl.store(at_out + d[None, :] * stride, x.to(at_out.dtype.element_ty), mask=mask)
