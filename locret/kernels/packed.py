"""Keys and values of a few bits: how the kernels take them, and in full precision again.

KIVI (arXiv 2402.02750): keys per channel of a block of units, values per unit and group of
channels. A chunk of a prompt attends to a layer that was expanded for it, one launch a tensor.
Products of a scale (float16) and a code are exact in float32, so that the kernel rounds once for
the sum and once for the output, as its twin does: both give the same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locret.kernels.dispatch import on_device, padded, takes_triton, tl, triton, units_at

_ELEMENTS = 4096  # codes' bytes that a program expands


@dataclass(frozen=True)
class PackedKV:
    """Keys and values of P units, x = minimum + scale * code.

    Codes are planar: of the M = ceil(D * bits / 8) bytes of a unit, bits [i * bits, (i + 1) * bits)
    of byte j are channel i * M + j. Any strides, elements of the last axis side by side.

    Attributes:
        keys: codes uint8 [B, H, P, M], scale and minimum float16 [B, H, G, D], an entry for each
            block of units.
        starts: int32 [B, H, G + 1]; block i is the units starts[i] <= u < starts[i + 1], the first
            start is 0, the last P; blocks may be empty.
        values: codes uint8 [B, H, P, M], scale and minimum float16 [B, H, P, ceil(D / group)].
        bits: 8, 4 or 2.
        group: channels that share a scale of a value, and about the most units of a block.
    """

    keys: tuple[Tensor, ...]
    starts: Tensor
    values: tuple[Tensor, ...]
    bits: int
    group: int

    @property
    def count(self) -> int:
        """P."""
        return self.keys[0].shape[2]


def expand_units(
    packed: Sequence[Tensor], bits: int, group: int, out: Tensor, starts: Tensor | None = None
) -> None:
    """Write minimum + scale * code, for the keys or the values of P packed units.

    Args:
        packed, bits, group: `keys` or `values` of `PackedKV`, of any strides, and how they are.
        out: [B, H, P, D], floating; may be a view of larger storage.
        starts: of the blocks of keys; None = these are values.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_packed(packed, bits, group, out.shape, starts)
    if not out.is_floating_point():
        raise ValueError(f"out is {out.dtype}; expected a floating type")
    size = out.shape[3]
    if not takes_triton(*packed, out, *(() if starts is None else (starts,))):
        out.copy_(expand_units_reference(packed, bits, group, size, starts))
    elif out.numel():
        batch, heads, count, nbytes = packed[0].shape
        blocks = packed[1].shape[2]
        byte_block = padded(nbytes)
        units = max(1, _ELEMENTS // byte_block)
        tensors = (*packed, out)
        with on_device(out):
            _expand[(triton.cdiv(count, units), heads, batch)](
                *(tensors, None if starts is None else starts.contiguous()),
                *(count, blocks, blocks.bit_length(), tuple(tensor.stride() for tensor in tensors)),
                SIZE=size,
                BITS=bits,
                GROUP=group,
                BYTES=nbytes,
                BYTE_BLOCK=byte_block,
                UNITS=units,
                num_warps=4,
            )


def expand_units_reference(
    packed: Sequence[Tensor], bits: int, group: int, size: int, starts: Tensor | None = None
) -> Tensor:
    """The twin of `expand_units`, in plain PyTorch: float32 [B, H, P, D = size]."""
    codes, scale, minimum = packed
    planes = [(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    x = torch.cat(planes, dim=-1)[..., :size].float()
    if starts is None:
        channel = torch.arange(size, device=codes.device) // group
        return minimum[..., channel].float() + scale[..., channel].float() * x
    block = owners(starts, codes.shape[2])[..., None].expand(-1, -1, -1, size)
    return minimum.float().gather(2, block) + scale.float().gather(2, block) * x


def owners(starts: Tensor, units: int) -> Tensor:
    """The block of each unit, long [B, H, units], from int32 starts [B, H, G + 1]."""
    unit = torch.arange(units, dtype=starts.dtype, device=starts.device)
    ends = starts[..., 1:].contiguous()
    return torch.searchsorted(ends, unit.expand(*ends.shape[:-1], -1).contiguous(), right=True)


def check_packed(
    packed: Sequence[Tensor],
    bits: int,
    group: int,
    shape: Sequence[int],
    starts: Tensor | None,
    name: str = "",
) -> None:
    """Refuse what does not fit keys or values [B, H, P, D] = `shape`; arguments as of
    `expand_units`, `name` before what they are called in the error."""
    if bits not in (2, 4, 8):
        raise ValueError(f"bits is {bits}; expected 2, 4 or 8")
    (codes, scale, minimum), (batch, heads, count, size) = packed, shape
    table = (count, -(-size // group)) if starts is None else (scale.shape[2], size)
    expected: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "codes": (codes, torch.uint8, (count, -(-size * bits // 8))),
        "scale": (scale, torch.float16, table),
        "minimum": (minimum, torch.float16, table),
    }
    if starts is not None:
        expected["starts"] = (starts, torch.int32, (scale.shape[2] + 1,))
    for what, (tensor, dtype, each) in expected.items():
        if tensor.dtype != dtype or tensor.shape != (batch, heads, *each):
            raise ValueError(
                f"{name}{what} is {tensor.dtype} {tuple(tensor.shape)}; "
                f"expected {dtype} {(batch, heads, *each)}"
            )


def power_of_two_in(*numbers: int) -> int:
    """The largest power of two that divides all `numbers`."""
    common = math.gcd(*numbers)
    return common & -common


# Nothing is compiled anew for these, which differ from chunk to chunk.
@triton.jit(do_not_specialize=["count", "blocks", "steps"])
def _expand(  # type: ignore[no-untyped-def]
    tensors,
    starts,
    count,
    blocks,
    steps,
    strides,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    BYTE_BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    there = unit < count
    entry = unit
    if starts is not None:
        # The first block that ends behind the unit: halve where it can be, for all units at once.
        ends = starts + (b * tl.num_programs(1) + h) * (blocks + 1) + 1
        entry = tl.zeros((UNITS,), tl.int32)
        last = entry + blocks
        for _ in range(steps):
            undecided = there & (entry < last)
            middle = (entry + last) // 2
            before = tl.load(ends + middle.to(tl.int64), mask=undecided, other=0) <= unit
            entry, last = (
                tl.where(undecided & before, middle + 1, entry),
                tl.where(before, last, middle),
            )
    unit = unit.to(tl.int64)[:, None]
    entry = entry.to(tl.int64)[:, None]
    byte = tl.arange(0, BYTE_BLOCK)
    in_bytes = there[:, None] & (byte < BYTES)[None, :]
    at = units_at(tensors[0], strides[0], b, h, unit) + byte[None, :] * strides[0][3]
    packed = tl.load(at, mask=in_bytes, other=0).to(tl.int32)
    at_scale = units_at(tensors[1], strides[1], b, h, entry)
    at_minimum = units_at(tensors[2], strides[2], b, h, entry)
    out = tensors[3]
    at_out = units_at(out, strides[3], b, h, unit)
    for plane in tl.static_range(8 // BITS):
        channel = (plane * BYTES + byte)[None, :]
        mask = in_bytes & (channel < SIZE)
        d = channel if starts is not None else channel // GROUP
        step = tl.load(at_scale + d * strides[1][3], mask=mask, other=0.0)
        low = tl.load(at_minimum + d * strides[2][3], mask=mask, other=0.0)
        code = ((packed >> (plane * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        x = low.to(tl.float32) + step.to(tl.float32) * code
        tl.store(at_out + channel * strides[3][3], x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def of_head(tensors, strides, b, h):  # type: ignore[no-untyped-def]
    """Where a head begins in each of some tensors."""
    moved = ()  # type: tuple
    for i in tl.static_range(len(tensors)):
        moved += (tensors[i] + b * strides[i][0] + h * strides[i][1],)
    return moved


@triton.jit
def block_of(ends, unit, blocks):  # type: ignore[no-untyped-def]
    """The block that holds a unit: as many blocks as end at or before it come first."""
    block = tl.full((), 0, tl.int32)
    for start in range(0, blocks, 1024):
        i = start + tl.arange(0, 1024)
        end = tl.load(ends + i, mask=i < blocks, other=2**31 - 1)
        block += tl.sum((end <= unit).to(tl.int32), 0)
    return block
