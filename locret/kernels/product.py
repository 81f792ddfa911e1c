"""Products of matrices with one token's vector, in one launch.

A step of one row reads every weight once, so that its time is that of the copy. Several matrices
that read the same vector, such as those of query, key and value, take one launch; so do gate and up
of an MLP, whose activation is applied on the way out. From a few rows on the matrix units are
faster.

K input size, N output size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from locret.kernels.dispatch import check_tensors, on_device, takes_triton, tl, triton
from locret.kernels.gated import ACTIVATIONS, activated

_MATRICES = 3
_OUTPUTS = 2  # of a program
_INPUTS = 1024  # of a turn of a program
_WARPS = 4


def products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()
) -> tuple[Tensor, ...]:
    """x @ weight.T + bias for each of up to three matrices.

    Args:
        x: [1, 1, K], contiguous.
        weights: [N, K] each, of one float dtype, that of x; contiguous.
        biases: [N] or None for each; none given = no biases. All matrices have one, or none has.

    Returns:
        [1, 1, N] each, in x's dtype, summed up in float32.

    Raises:
        ValueError: other shapes, dtypes or numbers of matrices.
    """
    biases = biases or [None] * len(weights)
    _check(x, weights, biases)
    if not takes_triton(x, *weights):
        return products_reference(x, weights, biases)
    sizes = [len(weight) for weight in weights]
    out = torch.empty(1, 1, sum(sizes), dtype=x.dtype, device=x.device)
    spare = _MATRICES - len(weights)
    given, counts = [*weights, *[weights[0]] * spare], [*sizes, *[0] * spare]
    added = [x if bias is None else bias for bias in [*biases, *[biases[0]] * spare]]
    with on_device(x):
        _products[(sum(triton.cdiv(n, _OUTPUTS) for n in counts),)](
            *(x, *given, *added, out, x.shape[-1], *counts),
            BIAS=biases[0] is not None,
            N=_OUTPUTS,
            K=_INPUTS,
            num_warps=_WARPS,
        )
    return out.split(sizes, -1)


def products_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The twin of `products`, in plain PyTorch."""
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


def gated_products(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(x @ gate.T) * (x @ up.T), each product rounded to x's dtype before, as
    `locret.kernels.gated` has it.

    Args:
        x: [1, 1, K], contiguous.
        gate, up: [N, K], in x's dtype, contiguous.
        activation: a name of `locret.kernels.gated.ACTIVATIONS`.

    Returns:
        [1, 1, N], in x's dtype.

    Raises:
        ValueError: other shapes or dtypes, or the activation is unknown.
    """
    _check(x, (gate, up), (None, None))
    if gate.shape != up.shape or activation not in ACTIVATIONS:
        raise ValueError(
            f"gate is {tuple(gate.shape)}, up {tuple(up.shape)} and activation {activation!r}; "
            f"expected two of one shape and one of {[*ACTIVATIONS]}"
        )
    if not takes_triton(x, gate, up):
        return gated_products_reference(x, gate, up, activation)
    out = torch.empty(1, 1, len(gate), dtype=x.dtype, device=x.device)
    with on_device(x):
        _gated_products[(triton.cdiv(len(gate), _OUTPUTS),)](
            *(x, gate, up, out, x.shape[-1], len(gate)),
            SILU=activation == "silu",
            N=_OUTPUTS,
            K=_INPUTS,
            num_warps=_WARPS,
        )
    return out


def gated_products_reference(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The twin of `gated_products`, in plain PyTorch."""
    return ACTIVATIONS[activation](F.linear(x, gate)) * F.linear(x, up)


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    if not 1 <= len(weights) == len(biases) <= _MATRICES:
        raise ValueError(
            f"{len(weights)} matrices and {len(biases)} biases; expected 1 to {_MATRICES} of both"
        )
    if x.dim() != 3 or x.shape[:2] != (1, 1):
        raise ValueError(f"x is {tuple(x.shape)}; expected [1, 1, K]")
    if len({bias is None for bias in biases}) > 1:
        raise ValueError("some matrices have a bias and some have none; expected all or none")
    check_tensors({"x": (x, x.dtype, x.shape)})
    for weight, bias in zip(weights, biases, strict=True):
        shapes = (len(weight), x.shape[-1]), (len(weight),)
        check_tensors({"weight": (weight, x.dtype, shapes[0]), "bias": (bias, x.dtype, shapes[1])})


@triton.jit
def _dot(x, weight, n, there, inputs, N: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Outputs `n`, [N] float32."""
    sums = tl.zeros([N, K], dtype=tl.float32)
    at = weight + n.to(tl.int64)[:, None] * inputs
    for start in range(0, inputs, K):
        k = start + tl.arange(0, K)
        in_row = k < inputs
        tile = tl.load(
            at + k[None, :],
            mask=there[:, None] & in_row[None, :],
            other=0.0,
            eviction_policy="evict_first",  # nobody reads a weight twice
        )
        vector = tl.load(x + k, mask=in_row, other=0.0)
        sums += tile.to(tl.float32) * vector.to(tl.float32)[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    x, w0, w1, w2, b0, b1, b2, out, inputs, n0, n1, n2,
    BIAS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, weight, bias, size = 0, w0, b0, n0
    tiles = tl.cdiv(n0, N)
    if tile >= tiles:
        tile -= tiles
        tiles = tl.cdiv(n1, N)
        first, weight, bias, size = n0, w1, b1, n1
        if tile >= tiles:
            tile -= tiles
            first, weight, bias, size = n0 + n1, w2, b2, n2
    n = tile * N + tl.arange(0, N)
    there = n < size
    sums = _dot(x, weight, n, there, inputs, N, K)
    if BIAS:
        sums += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + first + n, sums.to(out.dtype.element_ty), mask=there)


@triton.jit
def _gated_products(  # type: ignore[no-untyped-def]
    x, gate, up, out, inputs, size, SILU: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    n = tl.program_id(0) * N + tl.arange(0, N)
    there = n < size
    a = _dot(x, gate, n, there, inputs, N, K)
    b = _dot(x, up, n, there, inputs, N, K)
    a = a.to(out.dtype.element_ty).to(tl.float32)
    a = activated(a, SILU).to(out.dtype.element_ty).to(tl.float32)
    b = b.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + n, (a * b).to(out.dtype.element_ty), mask=there)
