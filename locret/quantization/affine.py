"""Asymmetric quantization of groups: x ~ minimum + scale * code, codes 0 .. 2 ** bits - 1.

Formula (KIVI, arXiv 2402.02750, section 3.1), for a group with smallest value `low` and largest
value `high`, and Q = 2 ** bits - 1:

    minimum = low,   scale = (high - low) / Q,   code = clamp(round((x - minimum) / scale), 0, Q)

Scale and minimum are stored as float16, and float16 is also the finest precision in which values
are looked at (bfloat16 values are float16 values too, within float16's range; float32 is rounded).
Math is in float32.

Error: |x - (minimum + scale * code)| <= scale / 2 + STORAGE_ERROR for an x that float16 holds.
Rounding the scale down leaves `high` at most Q * scale * 2 ** -11 above the last code, which is
less than half a step at 8 bits or fewer; rounding the scale up costs nothing but that much step.

Quantizing again what was dequantized to the input's type gives the same codes, scale and minimum
(float32 goes as float16 does). Why: `low` has code 0 and comes back exactly, `high` has Q. With
w = minimum + Q * scale and y its rounding, either y is so near to w that (y - minimum) / Q rounds
to the same scale again; or it is not, and then `high`, itself a value of that type and no farther
from w than that, is what w rounds to. The same holds of every code, with half a step for the
distance. Float16 has twice the spacing above a power of two as below, so a scale that is one can
miss on the wide side; its second derivation, from y, lands beside it and stays (`_settled`).
"""

import torch
from torch import Tensor

from locret.quantization.packing import check_bits

LARGEST = 2.0**15
"""Largest magnitude that is quantized; float16 ends not far above."""

STORAGE_ERROR = 2.0**-25
"""Half of float16's smallest step: what storing the minimum of a group of tiny values may cost."""


def smallest_scale(bits: int) -> float:
    """The scale of a constant group: fine enough to be harmless, coarse enough that float16 holds
    every scale from here on to well within half a step of the last code."""
    return 2.0 ** (bits - 24)


def quantize(
    x: Tensor, bits: int, dim: int, usable: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups that lie along one axis.

    Args:
        x: floating, any shape; everything along `dim` is one group.
        bits: 2, 4 or 8.
        dim: the axis that a group runs along.
        usable: bool, like `x`; False: the value has no say in its group's scale and minimum (it is
            padding, or kept elsewhere), and its code means nothing. None = all are usable.

    Returns:
        codes: uint8, like `x`.
        scale, minimum: float16, like `x` with length 1 along `dim`.

    Raises:
        ValueError: usable values are not finite, or beyond `LARGEST`.
    """
    check_bits(bits)
    x_dtype, x = _output_dtype(x), as_stored(x)
    low, high = _extremes(x, dim, usable)
    refuse_unstorable(torch.maximum(low.abs(), high.abs()))
    minimum = low.half()
    scale = _settled(minimum.float(), high, bits, x_dtype)
    steps = (x - minimum.float()) / scale.float()
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8), scale, minimum


def dequantize(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """minimum + scale * code, float32.

    Args:
        codes: uint8.
        scale, minimum: float16, broadcast against `codes`.
    """
    return minimum.float() + scale.float() * codes.float()


def as_stored(x: Tensor) -> Tensor:
    """`x` in float32, rounded to what float16 holds."""
    return x.half().float() if x.dtype != torch.float16 else x.float()


def refuse_unstorable(x: Tensor) -> None:
    """
    Raises:
        ValueError: a value is not finite, or beyond `LARGEST`.
    """
    if not bool((x.abs() <= LARGEST).all()):
        raise ValueError(
            f"cannot quantize: keys or values hold NaN, infinity or magnitudes above {LARGEST:.0f}"
            "; quantization 'none' stores them as they are"
        )


def _output_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16


def _settled(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The scale of a group, taken twice: from its range, and from its range as restored."""
    last = 2**bits - 1
    for _ in range(2):
        scale = ((high - low) / last).clamp(min=smallest_scale(bits)).half()
        step = scale.float()
        high = (low + step * ((high - low) / step).round().clamp(0, last)).to(dtype).float()
    return scale


def _extremes(x: Tensor, dim: int, usable: Tensor | None) -> tuple[Tensor, Tensor]:
    if usable is None:
        return x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    low = x.masked_fill(~usable, torch.inf).amin(dim, keepdim=True)
    high = x.masked_fill(~usable, -torch.inf).amax(dim, keepdim=True)
    empty = ~usable.any(dim, keepdim=True)
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
