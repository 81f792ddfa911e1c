"""Keys and values of a few bits: how the kernels take them, and in full precision again.

KIVI (arXiv 2402.02750): keys per channel of a block of units, values per unit and group of
channels. A chunk of a prompt attends to a layer that was expanded for it, one launch a tensor.
Products of a scale (float16) and a code are exact in float32, so that the kernel rounds once for
the sum and once for the output, as its twin does: both give the same bits.

Or 8-bit floats, x = mean + scale * code (`expand_floats`): a code has 4 significant bits and a
scale 11, so that their product is exact too.

N units of flat sequences, G blocks, D head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from locret.kernels.splits import Shares, States

STEP = 64  # most units of a block that kernels take at a time
PROGRAMS = 3  # programs that share a multiprocessor
_REGISTERS = 168  # of a thread, so that PROGRAMS of 128 threads fit
_ELEMENTS = 4096  # codes' bytes that a program expands
_UNITS = 128  # most units whose codes these are


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
        packed, bits, group: `keys` or `values` of `PackedKV`, and how they are packed.
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
        nbytes = packed[0].shape[1]
        byte_block = padded(nbytes)
        units = min(_UNITS, max(1, _ELEMENTS // byte_block))
        with on_device(out):
            _expand[(triton.cdiv(count, units),)](
                *(tuple(packed), starts, out, at),
                *(count, 0 if starts is None else len(starts) - 1, out.stride()),
                SIZE=size,
                BITS=bits,
                GROUP=group,
                BYTE_BLOCK=byte_block,
                UNITS=units,
                num_warps=4,
            )


def expand_units_reference(
    packed: Sequence[Tensor], bits: int, group: int, size: int, starts: Tensor | None = None
) -> Tensor:
    """The twin of `expand_units`, in plain PyTorch: float32 [N, D = size]."""
    codes, scale, minimum = packed
    planes = [(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    x = torch.cat(planes, dim=-1)[:, :size].float()
    if starts is None:
        channel = torch.arange(size, device=codes.device) // group
        return minimum[:, channel].float() + scale[:, channel].float() * x
    block = blocks_at(starts, torch.arange(len(codes), device=starts.device).int())
    return minimum[block].float() + scale[block].float() * x


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
    if bits not in (2, 4, 8):
        raise ValueError(f"bits is {bits}; expected 2, 4 or 8")
    (codes, scale, minimum), (count, size) = packed, shape
    table = (count, -(-size // group)) if starts is None else (len(scale), size)
    check_tensors(
        {
            f"{name}codes": (codes, torch.uint8, (count, -(-size * bits // 8))),
            f"{name}scale": (scale, torch.float16, table),
            f"{name}minimum": (minimum, torch.float16, table),
            f"{name}starts": (starts, torch.int32, (len(scale) + 1,)),
        }
    )


def step_arguments(
    query: Tensor, packed: Packed, shares: PackedShares, scaling: float, states: States
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a kernel that leaves the attention over packed units in `states` takes: by order, and by
    name."""
    heads = len(shares.lengths) // len(query)
    tensors = (*packed.keys, *packed.values), (packed.starts, shares.tiles, shares.blocks)
    numbers = scaling * math.log2(math.e), heads, len(packed.starts) - 1, query.stride()
    sizes = {"NEW": query.shape[2], "QUERIES": states.weights.shape[1], "SIZE": query.shape[3]}
    return (query, *tensors, (states.values, states.weights), *numbers), sizes


def is_wide(query: Tensor) -> bool:
    """Whether units are expanded to float32, for precision or where assembly, NVIDIA's, is not."""
    return query.dtype == torch.float32 or torch.version.hip is not None


def launch_options(query: Tensor, queries: int) -> dict[str, Any]:
    """How programs that hold `queries` queries expand units, and with how many threads and
    registers so that `PROGRAMS` fit."""
    wide, block = is_wide(query), padded(queries, least=16)
    return {
        "QUERY_BLOCK": block,
        "UPCAST": INTERPRETED or wide,
        "num_warps": 8 if wide else 4,
        "maxnreg": None if wide or block > 16 else _REGISTERS,
    }


def power_of_two_in(*numbers: int) -> int:
    """The largest power of two that divides all `numbers`."""
    common = math.gcd(*numbers)
    return common & -common


@triton.jit
def next_step(at, end, after, block, blocks, UNITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a step after that at `at` begins, the end of its block, and the block.

    A step takes the units at .. end - 1 of one block, UNITS of them at most; `after` is where the
    next block ends. Everything that a step needs is asked for before any of it is used.
    """
    is_done = at + UNITS >= end
    block = tl.minimum(tl.where(is_done, block + 1, block), blocks - 1)
    return tl.minimum(at + UNITS, end), tl.where(is_done, after, end), block


@triton.jit(do_not_specialize=["count", "blocks"])
def _expand(  # type: ignore[no-untyped-def]
    packed, starts, out, rows, count, blocks, out_strides,
    SIZE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BYTE_BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
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
        step = tl.load(packed[1] + entry + d, mask=mask, other=0.0)
        low = tl.load(packed[2] + entry + d, mask=mask, other=0.0)
        code = ((bits >> (plane * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        x = low.to(tl.float32) + step.to(tl.float32) * code
        at = out + at_out + channel * out_strides[1]
        tl.store(at, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def row_of(rows, unit, there):  # type: ignore[no-untyped-def]
    """The row that each unit goes to, int64."""
    row = unit.to(tl.int64)
    if rows is not None:
        row = tl.load(rows + unit, mask=there, other=0)
    return row


@triton.jit
def blocks_of(starts, first, UNITS: tl.constexpr, blocks):  # type: ignore[no-untyped-def]
    """The blocks of the units first .. first + UNITS - 1, int32 [UNITS]."""
    # Where the first one is: the range that holds it shrinks 256-fold with each load.
    block = tl.full((), 0, tl.int32)
    left = blocks
    while left > 1:
        step = tl.cdiv(left, 256)
        i = tl.arange(0, 256) * step
        candidates = tl.load(starts + block + i, mask=i < left, other=2**31 - 1)
        found = (tl.sum((candidates <= first).to(tl.int32), 0) - 1) * step
        block += found
        left = tl.minimum(step, left - found)
    # No block is empty, so that the others are among the next ones.
    i = tl.arange(0, UNITS)
    following = block + 1 + i
    ends = tl.load(starts + following, mask=following < blocks, other=2**31 - 1)
    return block + tl.sum((ends[None, :] <= (first + i)[:, None]).to(tl.int32), 1)


def expand_floats(
    packed: Sequence[Tensor], out: Tensor, starts: Tensor | None = None, at: Tensor | None = None
) -> None:
    """Write the keys or the values of N units.

    Args:
        packed: of keys, the bits of e4m3 codes uint8 [N, D], scale and mean float16 [G, D]; of
            values, codes and scale float16 [N, 1]. All contiguous.
        out: [R, D], floating, any strides.
        starts: of the blocks of keys, int32 [G + 1]; None = these are values.
        at: long [N], the row of `out` that each unit goes to, as of `expand_units`; None = all R =
            N rows, in order.
    """
    count = packed[0].shape[0]
    size = check_rows(count, out, at)
    _check_floats(packed, (count, size), starts)
    if not takes_triton(*packed, out, starts, at):
        x = expand_floats_reference(packed, starts)
        out[slice(None) if at is None else at] = x.to(out.dtype)
    elif count:
        wide = padded(size)
        units = min(_UNITS, max(1, _ELEMENTS // wide))
        with on_device(out):
            _expand_floats[(triton.cdiv(count, units),)](
                *(tuple(packed), starts, out, at),
                *(count, 0 if starts is None else len(starts) - 1, out.stride()),
                SIZE=size,
                SIZE_BLOCK=wide,
                UNITS=units,
                num_warps=4,
            )


def expand_floats_reference(packed: Sequence[Tensor], starts: Tensor | None = None) -> Tensor:
    """The twin of `expand_floats`, in plain PyTorch: float32 [N, D]."""
    codes = packed[0].view(torch.float8_e4m3fn).float()
    if starts is None:
        return codes * packed[1].float()
    block = blocks_at(starts, torch.arange(len(codes), device=starts.device).int())
    return codes * packed[1][block].float() + packed[2][block].float()


def _check_floats(packed: Sequence[Tensor], shape: tuple[int, int], starts: Tensor | None) -> None:
    codes, scale, mean = (*packed, None) if starts is None else packed
    assert codes is not None and scale is not None
    table = (shape[0], 1) if starts is None else (len(scale), shape[1])
    check_tensors(
        {
            "codes": (codes, torch.uint8, shape),
            "scale": (scale, torch.float16, table),
            "mean": (mean, torch.float16, table),
            "starts": (starts, torch.int32, (len(scale) + 1,)),
        }
    )


@triton.jit(do_not_specialize=["count", "blocks"])
def _expand_floats(  # type: ignore[no-untyped-def]
    packed, starts, out, rows, count, blocks, out_strides,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * UNITS
    unit = first + tl.arange(0, UNITS)
    there = unit < count
    d = tl.arange(0, SIZE_BLOCK)[None, :]
    mask = there[:, None] & (d < SIZE)
    at = unit.to(tl.int64)[:, None]
    code = tl.load(packed[0] + at * SIZE + d, mask=mask, other=0).to(tl.int32)
    # With three bits of exponent more in front these are the bits of a float16, 2 ** 8 times as
    # small, numbers below the normal ones included; not every GPU knows e4m3.
    bits = ((code & 128) << 8) | ((code & 127) << 7)
    x = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    if starts is not None:
        entry = blocks_of(starts, first, UNITS, blocks).to(tl.int64)[:, None] * SIZE + d
        scale = tl.load(packed[1] + entry, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(packed[2] + entry, mask=mask, other=0.0).to(tl.float32)
        x = x * scale + mean
    else:
        x *= tl.load(packed[1] + at, mask=there[:, None], other=0.0).to(tl.float32)
    to = out + row_of(rows, unit, there)[:, None] * out_strides[0] + d * out_strides[1]
    tl.store(to, x.to(out.dtype.element_ty), mask=mask)
