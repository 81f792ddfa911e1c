"""What a layer computes beside attention, each in one launch: the sum with its residual stream and
the norm of that (RMSNorm), the activation of a gated MLP, and products of matrices with one token's
vector.

A step of one row reads every weight once, so that its time is that of the copy. Several matrices
that read the same vector, such as those of query, key and value, take one launch; so do gate and up
of an MLP, whose activation is applied on the way out. From a few rows on the matrix units are
faster. Weights may be in FP8 with a scale a row: a step reads half as many bytes then.

K input size, N output size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from locret.kernels.dispatch import (
    check_tensors,
    early,
    on_device,
    padded,
    start_next,
    takes_triton,
    tl,
    triton,
    wait_for_last,
)
from locret.kernels.fp8 import E4M3

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
"""By the name that configurations give them."""

_FEW_ROWS = 64
_CHANNELS = 256  # that a warp takes: one load of 16 bytes a thread, in 16 bits
_LEAST = 1024  # of a program, where rows are shorter and many: those of heads
_CPU_ELEMENTS = 2**18  # that a CPU normalises at a time: float32 of them fits a cache
_MATRICES = 3
_OUTPUTS = 2  # of a program
_INPUTS = 1024  # of a turn of a program
_INPUTS_FP8 = 2048  # as many bytes
_WARPS = 4


class HeadNorms(NamedTuple):
    """RMSNorm of each head, before its rotation: weights [D] of queries and of keys."""

    query: Tensor
    key: Tensor
    eps: float


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
                **early(residual),
            )
    return summed, normed


def add_norm_reference(
    residual: Tensor, new: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed = residual if new is None else residual + new
    return summed, norm_reference(summed, weight, eps)


def norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over the last dimension, in plain PyTorch."""
    if x.device.type == "cpu" and x.numel() > _CPU_ELEMENTS and x.dim() > 1:
        return _norm_of_blocks(x, weight, eps)
    return _norm(x, weight, eps)


def _norm_of_blocks(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    blocks = x.flatten(0, -2).split(max(1, _CPU_ELEMENTS // x.shape[-1]))
    return torch.cat([_norm(each, weight, eps) for each in blocks]).view(x.shape)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@triton.jit(do_not_specialize=["count"])
def _add_norm(  # type: ignore[no-untyped-def]
    residual, new, weight, summed, normed, count, eps,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start_next(EARLY)
    d = tl.arange(0, BLOCK)[None, :]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = row * SIZE + d
    there = (d < SIZE) & (row < count)
    w = tl.load(weight + d, mask=d < SIZE, other=0.0).to(tl.float32)
    wait_for_last(EARLY)
    x = tl.load(residual + at, mask=there, other=0.0)
    if new is not None:
        more = tl.load(new + at, mask=there, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + more).to(x.dtype)
        tl.store(summed + at, x, mask=there)
    x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / SIZE + eps)
    x = x.to(normed.dtype.element_ty).to(tl.float32)
    tl.store(normed + at, (w * x).to(normed.dtype.element_ty), mask=there)


def gated(gate: Tensor, up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """activation(gate) * up; the activation is computed in float32 and rounded before the product.

    Args:
        gate, up: [..., size], of one float dtype; the last dimension contiguous. Either may be a
            half of one product.
        activation: a name of `ACTIVATIONS`.
        out: contiguous room that the result may take; may be `gate` itself.

    Returns:
        [..., size], contiguous, in gate's dtype.
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


def products(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
    scales: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """x @ weight.T + bias for each of up to three matrices.

    Args:
        x: [1, 1, K], contiguous.
        weights: [N, K] each, of one float dtype, that of x; contiguous. With `scales`, e4m3.
        biases: [N] or None for each; none given = no biases. All matrices have one, or none has.
        scales: [N, 1] float32 of each: what the rows of the weights are multiplied by.

    Returns:
        [1, 1, N] each, in x's dtype, summed up in float32.
    """
    biases = biases or [None] * len(weights)
    _check(x, weights, biases, scales)
    if not takes_triton(x, *weights):
        return products_reference(x, weights, biases, scales)
    sizes = [len(weight) for weight in weights]
    out = torch.empty(1, 1, sum(sizes), dtype=x.dtype, device=x.device)
    spare = _MATRICES - len(weights)
    given, counts = [*weights, *[weights[0]] * spare], [*sizes, *[0] * spare]
    added = [x if bias is None else bias for bias in [*biases, *[biases[0]] * spare]]
    factors = [*scales, *[scales[0]] * spare] if scales else [x] * _MATRICES
    with on_device(x):
        _products[(sum(triton.cdiv(n, _OUTPUTS) for n in counts),)](
            *(x, *given, *added, *factors, out, x.shape[-1], *counts),
            BIAS=biases[0] is not None,
            SCALED=bool(scales),
            N=_OUTPUTS,
            K=_INPUTS_FP8 if scales else _INPUTS,
            num_warps=_WARPS,
            **early(x),
        )
    return out.split(sizes, -1)


def products_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    weights = _widened(x, weights, scales)
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


def _widened(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor]) -> Sequence[Tensor]:
    """Weights in x's dtype."""
    if not scales:
        return weights
    return [(w.float() * s).to(x.dtype) for w, s in zip(weights, scales, strict=True)]


def gated_products(
    x: Tensor, gate: Tensor, up: Tensor, activation: str, scales: Sequence[Tensor] = ()
) -> Tensor:
    """activation(x @ gate.T) * (x @ up.T), each product rounded to x's dtype before, as
    `gated` has it.

    Args:
        x: [1, 1, K], contiguous.
        gate, up: [N, K], in x's dtype, contiguous. With `scales`, e4m3.
        activation: a name of `ACTIVATIONS`.
        scales: as for `products`, of both.

    Returns:
        [1, 1, N], in x's dtype.
    """
    _check(x, (gate, up), (None, None), scales)
    if gate.shape != up.shape or activation not in ACTIVATIONS:
        raise ValueError(
            f"gate is {tuple(gate.shape)}, up {tuple(up.shape)} and activation {activation!r}; "
            f"expected two of one shape and one of {[*ACTIVATIONS]}"
        )
    if not takes_triton(x, gate, up):
        return gated_products_reference(x, gate, up, activation, scales)
    out = torch.empty(1, 1, len(gate), dtype=x.dtype, device=x.device)
    with on_device(x):
        _gated_products[(triton.cdiv(len(gate), _OUTPUTS),)](
            *(x, gate, up, *(scales or (x, x)), out, x.shape[-1], len(gate)),
            SILU=activation == "silu",
            SCALED=bool(scales),
            N=_OUTPUTS,
            K=_INPUTS_FP8 if scales else _INPUTS,
            num_warps=_WARPS,
            **early(x),
        )
    return out


def gated_products_reference(
    x: Tensor, gate: Tensor, up: Tensor, activation: str, scales: Sequence[Tensor] = ()
) -> Tensor:
    gate, up = _widened(x, (gate, up), scales)
    return ACTIVATIONS[activation](F.linear(x, gate)) * F.linear(x, up)


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor],
) -> None:
    if not 1 <= len(weights) == len(biases) <= _MATRICES:
        raise ValueError(
            f"{len(weights)} matrices and {len(biases)} biases; expected 1 to {_MATRICES} of both"
        )
    if x.dim() != 3 or x.shape[:2] != (1, 1):
        raise ValueError(f"x is {tuple(x.shape)}; expected [1, 1, K]")
    if len({bias is None for bias in biases}) > 1:
        raise ValueError("some matrices have a bias and some have none; expected all or none")
    check_tensors({"x": (x, x.dtype, x.shape)})
    dtype = E4M3 if scales else x.dtype
    for weight, bias in zip(weights, biases, strict=True):
        shapes = (len(weight), x.shape[-1]), (len(weight),)
        check_tensors({"weight": (weight, dtype, shapes[0]), "bias": (bias, x.dtype, shapes[1])})
    for weight, scale in zip(weights, scales, strict=bool(scales)):
        check_tensors({"scale": (scale, torch.float32, (len(weight), 1))})


@triton.jit
def _tile(weight, n, there, k, inputs):  # type: ignore[no-untyped-def]
    """Weights of the outputs `n` [N] and the inputs `k` [K], [N, K]."""
    return tl.load(
        weight + n.to(tl.int64)[:, None] * inputs + k[None, :],
        mask=there[:, None] & (k < inputs)[None, :],
        other=0.0,
        eviction_policy="evict_first",  # nobody reads a weight twice
    )


@triton.jit
def _times(x, k, inputs, tile):  # type: ignore[no-untyped-def]
    vector = tl.load(x + k, mask=k < inputs, other=0.0)
    return tile.to(tl.float32) * vector.to(tl.float32)[None, :]


@triton.jit
def _dot(x, weight, n, there, inputs, first, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Outputs `n`, [N] float32; `first` is their tile of the first K inputs, which was read before
    x was there."""
    sums = _times(x, tl.arange(0, K), inputs, first)
    for start in range(K, inputs, K):
        k = start + tl.arange(0, K)
        sums += _times(x, k, inputs, _tile(weight, n, there, k, inputs))
    return tl.sum(sums, axis=1)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    x, w0, w1, w2, b0, b1, b2, s0, s1, s2, out, inputs, n0, n1, n2,
    BIAS: tl.constexpr, SCALED: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start_next(EARLY)
    tile = tl.program_id(0)
    first, weight, bias, scale, size = 0, w0, b0, s0, n0
    tiles = tl.cdiv(n0, N)
    if tile >= tiles:
        tile -= tiles
        tiles = tl.cdiv(n1, N)
        first, weight, bias, scale, size = n0, w1, b1, s1, n1
        if tile >= tiles:
            tile -= tiles
            first, weight, bias, scale, size = n0 + n1, w2, b2, s2, n2
    n = tile * N + tl.arange(0, N)
    there = n < size
    first_tile = _tile(weight, n, there, tl.arange(0, K), inputs)
    wait_for_last(EARLY)
    sums = _dot(x, weight, n, there, inputs, first_tile, K)
    if SCALED:
        sums *= tl.load(scale + n, mask=there, other=0.0)
    if BIAS:
        sums += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + first + n, sums.to(out.dtype.element_ty), mask=there)


@triton.jit
def _gated_products(  # type: ignore[no-untyped-def]
    x, gate, up, gate_scale, up_scale, out, inputs, size,
    SILU: tl.constexpr, SCALED: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    start_next(EARLY)
    n = tl.program_id(0) * N + tl.arange(0, N)
    there = n < size
    k = tl.arange(0, K)
    of_gate, of_up = _tile(gate, n, there, k, inputs), _tile(up, n, there, k, inputs)
    wait_for_last(EARLY)
    a = _dot(x, gate, n, there, inputs, of_gate, K)
    b = _dot(x, up, n, there, inputs, of_up, K)
    if SCALED:
        a *= tl.load(gate_scale + n, mask=there, other=0.0)
        b *= tl.load(up_scale + n, mask=there, other=0.0)
    a = a.to(out.dtype.element_ty).to(tl.float32)
    a = activated(a, SILU).to(out.dtype.element_ty).to(tl.float32)
    b = b.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + n, (a * b).to(out.dtype.element_ty), mask=there)
