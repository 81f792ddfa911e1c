"""Rows of activations in FP8, each with a scale of its own: what products in FP8 take.

e4m3 reaches 448, so that a row is divided by its scale: its largest absolute value over 448.
"""

import torch
from torch import Tensor

from locret.kernels.dispatch import check_tensors, on_device, padded, takes_triton, tl, triton

E4M3 = torch.float8_e4m3fn
_MOST = torch.finfo(E4M3).max
_LEAST = 1e-12
"""The least absolute maximum of a row: nothing is divided by that of a row of zeros."""
_CHANNELS = 512  # that a warp takes


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in e4m3, a scale a row.

    Args:
        x: [rows, K], contiguous, any float dtype.

    Returns:
        codes e4m3 [rows, K] and scales float32 [rows, 1]: a row is about its codes times its scale.
    """
    check_tensors({"x": (x, x.dtype, tuple(x.shape))})
    if not takes_triton(x):
        return round_rows_reference(x)
    rows, size = x.shape
    codes = torch.empty(rows, size, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = padded(size)
    if rows:
        with on_device(x):
            _round_rows[(rows,)](
                *(x, codes, scales),
                SIZE=size,
                BLOCK=block,
                MOST=_MOST,
                LEAST=_LEAST,
                num_warps=min(16, max(1, block // _CHANNELS)),
            )
    return codes, scales


def round_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=_LEAST) / _MOST
    return (wide / scales).to(E4M3), scales  # the largest is rounded down to 448, if it is above


@triton.jit
def _round_rows(  # type: ignore[no-untyped-def]
    x, codes, scales,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    there = k < SIZE
    wide = tl.load(x + row * SIZE + k, mask=there, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 0), LEAST) / MOST
    tl.store(scales + row, scale)
    scaled = tl.div_rn(wide, scale)  # of infinity and NaN: NaN, which nothing may hide
    tl.store(codes + row * SIZE + k, scaled.to(codes.dtype.element_ty), mask=there)
