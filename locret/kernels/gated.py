"""The activation of a gated MLP, activation(gate) * up, in one launch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from locret.kernels.dispatch import check_tensors, on_device, takes_triton, tl, triton

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
"""By the name that configurations give them."""

_FEW_ROWS = 64


def gated(gate: Tensor, up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """activation(gate) * up; the activation is computed in float32 and rounded before the product.

    Args:
        gate, up: [..., size], of one float dtype; the last dimension contiguous. Either may be a
            half of one product.
        activation: a name of `ACTIVATIONS`.
        out: contiguous room that the result may take; may be `gate` itself.

    Returns:
        [..., size], contiguous, in gate's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, or the activation is unknown.
    """
    check_tensors({"up": (up, gate.dtype, gate.shape)}, contiguous=False)
    check_tensors({"out": (out, gate.dtype, gate.shape)})
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {[*ACTIVATIONS]}")
    if not takes_triton(gate, up):
        return gated_reference(gate, up, activation)
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    size = gate.shape[-1]
    rows = (gate.reshape(-1, size), up.reshape(-1, size))
    # Channels of a program, 16 bytes a thread in 16 bits: a few rows are to reach many processors.
    block = 512 if len(rows[0]) <= _FEW_ROWS else 1024
    if out.numel():
        with on_device(gate):
            _gated[(triton.cdiv(size, block) * len(rows[0]),)](
                *(*rows, out, rows[0].stride(0), rows[1].stride(0), size),
                SILU=activation == "silu",
                BLOCK=block,
                num_warps=block // 256,
            )
    return out


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The twin of `gated`, in plain PyTorch."""
    return ACTIVATIONS[activation](gate).mul_(up)


@triton.jit
def activated(x, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """SiLU or GELU of float32."""
    if SILU:
        x *= tl.sigmoid(x)
    else:
        x *= 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    gate, up, out, gate_stride, up_stride, size, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(size, BLOCK)  # one dimension of programs: others end at 65,535
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = d < size
    x = tl.load(gate + row * gate_stride + d, mask=there, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_stride + d, mask=there, other=0.0).to(tl.float32)
    x = activated(x, SILU).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + d, (x * y).to(out.dtype.element_ty), mask=there)
