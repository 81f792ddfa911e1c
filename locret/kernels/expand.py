"""Units of a few bits in full precision again: what a chunk of a prompt attends to, layer by layer.

One launch writes all units of a tensor. Products of a scale (float16) and a code are exact in
float32, so that the kernel rounds once for the sum and once for the output, as its twin does: both
give the same bits.

KIVI (arXiv 2402.02750): keys per channel of a run of units, values per unit and group of channels.
"""

import torch
from torch import Tensor

from locret.kernels.dispatch import on_device, padded, takes_triton, tl, triton

_ELEMENTS = 4096  # codes' bytes that a program expands

ANY_NUMBER = ("count", "runs", "steps", "st_b", "st_h")
"""Numbers that differ from chunk to chunk, for which nothing is compiled anew."""


def expand_units(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    bits: int,
    group: int,
    out: Tensor,
    starts: Tensor | None = None,
) -> None:
    """Write minimum + scale * code, for the keys or the values of P packed units.

    Args:
        codes: uint8 [B, H, P, ceil(D * bits / 8)], planar (`PackedUnits`).
        scale, minimum: float16; of keys [B, H, G, D], a row for each run; of values
            [B, H, P, ceil(D / group)].
        bits: 8, 4 or 2.
        group: channels of a value that share a scale; keys have one for each channel.
        out: [B, H, P, D], floating; may be a view of larger storage.
        starts: int32 [B, H, G + 1], the first unit of each run of keys, the first 0 and the last P;
            None = these are values.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(codes, scale, minimum, bits, group, out, starts)
    tensors = (codes, scale, minimum, out, *(() if starts is None else (starts,)))
    if not takes_triton(*tensors):
        size = out.shape[3]
        out.copy_(expand_units_reference(codes, scale, minimum, bits, group, size, starts))
    elif out.numel():
        _launch(codes, scale, minimum, bits, group, out, starts)


def expand_units_reference(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    bits: int,
    group: int,
    size: int,
    starts: Tensor | None = None,
) -> Tensor:
    """The twin of `expand_units`, in plain PyTorch: float32 [B, H, P, D = size]."""
    planes = [(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    x = torch.cat(planes, dim=-1)[..., :size].float()
    if starts is None:
        channel = torch.arange(size, device=codes.device) // group
        return minimum[..., channel].float() + scale[..., channel].float() * x
    unit = torch.arange(codes.shape[2], dtype=torch.int32, device=codes.device)
    ends = starts[..., 1:].contiguous()
    run = torch.searchsorted(ends, unit.expand(*ends.shape[:2], -1).contiguous(), right=True)
    run = run[..., None].expand(-1, -1, -1, size)
    return minimum.float().gather(2, run) + scale.float().gather(2, run) * x


def _check(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    bits: int,
    group: int,
    out: Tensor,
    starts: Tensor | None,
) -> None:
    if bits not in (2, 4, 8):
        raise ValueError(f"bits is {bits}; expected 2, 4 or 8")
    batch, heads, count, size = out.shape
    runs = scale.shape[2]
    table = (batch, heads, count, -(-size // group))
    expected: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "codes": (codes, torch.uint8, (batch, heads, count, -(-size * bits // 8))),
        "scale": (scale, torch.float16, table),
        "minimum": (minimum, torch.float16, table),
    }
    if starts is not None:
        rows = (batch, heads, runs, size)
        expected |= {
            "scale": (scale, torch.float16, rows),
            "minimum": (minimum, torch.float16, rows),
            "starts": (starts, torch.int32, (batch, heads, runs + 1)),
        }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape}"
            )
    if not out.is_floating_point():
        raise ValueError(f"out is {out.dtype}; expected a floating type")


def _launch(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    bits: int,
    group: int,
    out: Tensor,
    starts: Tensor | None,
) -> None:
    batch, heads, count, nbytes = codes.shape
    runs = scale.shape[2]
    byte_block = padded(nbytes)
    units = max(1, _ELEMENTS // byte_block)
    with on_device(out):
        _expand[(triton.cdiv(count, units), heads, batch)](
            *(codes, scale, minimum, codes if starts is None else starts, out),
            *(count, runs, runs.bit_length()),
            *codes.stride(),
            *scale.stride(),
            *minimum.stride(),
            *((0, 0, 0) if starts is None else starts.stride()),
            *out.stride(),
            HAS_RUNS=starts is not None,
            SIZE=out.shape[3],
            BITS=bits,
            GROUP=group,
            BYTES=nbytes,
            BYTE_BLOCK=byte_block,
            UNITS=units,
            num_warps=4,
        )


@triton.jit(do_not_specialize=ANY_NUMBER)
def _expand(  # type: ignore[no-untyped-def]
    codes,
    scale,
    minimum,
    starts,
    out,
    count,
    runs,
    steps,
    c_b,
    c_h,
    c_s,
    c_d,
    s_b,
    s_h,
    s_r,
    s_d,
    m_b,
    m_h,
    m_r,
    m_d,
    st_b,
    st_h,
    st_r,
    o_b,
    o_h,
    o_s,
    o_d,
    HAS_RUNS: tl.constexpr,
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
    row = unit
    if HAS_RUNS:
        # The first run that ends behind the unit: halve where it can be, for all units at once.
        ends = starts + b * st_b + h * st_h + st_r
        row = tl.zeros((UNITS,), tl.int32)
        last = row + runs
        for _ in range(steps):
            undecided = there & (row < last)
            middle = (row + last) // 2
            before = tl.load(ends + middle.to(tl.int64) * st_r, mask=undecided, other=0) <= unit
            row, last = (
                tl.where(undecided & before, middle + 1, row),
                tl.where(before, last, middle),
            )
    unit = unit.to(tl.int64)
    row = row.to(tl.int64)
    byte = tl.arange(0, BYTE_BLOCK)
    in_bytes = there[:, None] & (byte < BYTES)[None, :]
    at = codes + b * c_b + h * c_h + unit[:, None] * c_s + byte[None, :] * c_d
    packed = tl.load(at, mask=in_bytes, other=0).to(tl.int32)
    at_scale = scale + b * s_b + h * s_h + row[:, None] * s_r
    at_minimum = minimum + b * m_b + h * m_h + row[:, None] * m_r
    at_out = out + b * o_b + h * o_h + unit[:, None] * o_s
    for plane in tl.static_range(8 // BITS):
        channel = plane * BYTES + byte
        mask = in_bytes & (channel < SIZE)[None, :]
        entry = channel if HAS_RUNS else channel // GROUP
        step = tl.load(at_scale + entry[None, :] * s_d, mask=mask, other=0.0).to(tl.float32)
        low = tl.load(at_minimum + entry[None, :] * m_d, mask=mask, other=0.0).to(tl.float32)
        code = ((packed >> (plane * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        x = low + step * code
        tl.store(at_out + channel[None, :] * o_d, x.to(out.dtype.element_ty), mask=mask)
