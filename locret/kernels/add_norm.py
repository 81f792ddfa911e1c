"""Add what a layer gives to its residual stream and normalise the sum by RMSNorm, in one launch."""

import torch
from torch import Tensor

from locret.kernels.dispatch import check_tensors, on_device, padded, takes_triton, tl, triton

_CHANNELS = 256  # that a warp takes: one load of 16 bytes a thread, in 16 bits
_LEAST = 1024  # of a program, where rows are shorter and many: those of heads


def add_norm(
    residual: Tensor, new: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual + new, and weight * sum / rms(sum).

    Computed as Llama does: the sum is rounded, normalised in float32, and rounded again before it
    is multiplied by the weight.

    Args:
        residual: [..., size], contiguous, any float dtype.
        new: what is added, likewise; None = nothing.
        weight: [size], of residual's dtype.
        eps: what is added to the mean of the squares.

    Returns:
        The sum (residual itself if nothing is added) and its norm, both like residual.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    size = residual.shape[-1]
    expected = {"residual": residual, "new": new}
    check_tensors({name: (x, residual.dtype, residual.shape) for name, x in expected.items()})
    check_tensors({"weight": (weight, residual.dtype, (size,))})
    if not takes_triton(residual, new, weight):
        return add_norm_reference(residual, new, weight, eps)
    summed = residual if new is None else torch.empty_like(residual)
    normed = torch.empty_like(residual)
    if residual.numel():
        count, block = residual.numel() // size, padded(size)
        rows = max(1, _LEAST // block) if count > _LEAST else 1
        with on_device(residual):
            _add_norm[(triton.cdiv(count, rows),)](
                *(residual, new, weight, summed, normed, count, eps),
                SIZE=size,
                ROWS=rows,
                BLOCK=block,
                num_warps=min(16, max(1, rows * block // _CHANNELS)),
            )
    return summed, normed


def add_norm_reference(
    residual: Tensor, new: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The twin of `add_norm`, in plain PyTorch."""
    summed = residual if new is None else residual + new
    return summed, norm_reference(summed, weight, eps)


def norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over the last dimension, in plain PyTorch."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    residual,
    new,
    weight,
    summed,
    normed,
    count,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.arange(0, BLOCK)[None, :]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = row * SIZE + d
    there = (d < SIZE) & (row < count)
    w = tl.load(weight + d, mask=d < SIZE, other=0.0).to(tl.float32)
    x = tl.load(residual + at, mask=there, other=0.0)
    if new is not None:
        more = tl.load(new + at, mask=there, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + more).to(x.dtype)
        tl.store(summed + at, x, mask=there)
    x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / SIZE + eps)
    x = x.to(normed.dtype.element_ty).to(tl.float32)
    tl.store(normed + at, (w * x).to(normed.dtype.element_ty), mask=there)
