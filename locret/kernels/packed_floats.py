"""Expanding units that were packed as 8-bit floats: x = mean + scale * code.

Keys share a scale and a mean per channel and block of units, values have a scale a unit and no
mean. A code has 4 significant bits and a scale 11, so that their product is exact in float32 and
the kernel rounds as its twin does: both give the same bits.

N units of flat sequences, G blocks, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from locret.kernels.dispatch import check_tensors, on_device, padded, takes_triton, tl, triton
from locret.kernels.packed import blocks_at, blocks_of, check_rows, row_of

_ELEMENTS = 4096  # that a program expands
_UNITS = 128  # most units that they are of


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

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    count = packed[0].shape[0]
    size = check_rows(count, out, at)
    _check(packed, (count, size), starts)
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


def _check(packed: Sequence[Tensor], shape: tuple[int, int], starts: Tensor | None) -> None:
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


# Nothing is compiled anew for these, which differ from chunk to chunk.
@triton.jit(do_not_specialize=["count", "blocks"])
def _expand_floats(  # type: ignore[no-untyped-def]
    packed,
    starts,
    out,
    rows,
    count,
    blocks,
    out_strides,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
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
