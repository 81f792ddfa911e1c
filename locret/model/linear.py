"""What linear modules make of their input: by kernels of ours and products of several modules at
once where nothing but their weights counts, else by a call of each.

Plain weights take our kernels for one token's vector. So do torchao's in FP8 with a scale a row
(`locret.model.weights`), whose input is not rounded there. More tokens are rounded once for all
modules that read them, and multiplied in FP8; torchao rounds them for every module, by several
launches. Modules of torchao that round in another way than `load_model` asks for are called.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from locret.kernels import gated, gated_products, products, round_rows
from locret.kernels.dense import ACTIVATIONS
from locret.model.weights import is_fp8, rounds_rows

_OURS = ("locret.", "transformers.utils.output_capturing")
"""Whose hooks do nothing in a forward that nobody asks for more than its output."""

_FP8_SIZES = 16  # of a product in FP8 both sizes of a matrix are multiples


class Matrix(NamedTuple):
    """A module's weight as kernels read it: [N, K] in the input's dtype, or e4m3 with a scale
    float32 [N, 1] of each row."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


def called(x: Tensor, *modules: Any) -> tuple[Tensor, ...]:
    """What linear modules make of x [B, T, K], in one launch where there is one token."""
    found = _matrices(x, modules)
    if found and _is_one(x) and len({matrix.bias is None for matrix in found}) == 1:
        weights, biases = [each.weight for each in found], [each.bias for each in found]
        return products(x.contiguous(), weights, biases, _scales(found))
    if not found or found[0].scale is None or not x.numel():  # torch multiplies no empty FP8
        return tuple(module(x) for module in modules)
    codes, scales = round_rows(x.reshape(-1, x.shape[-1]).contiguous())
    return tuple(_fp8_product(x, codes, scales, each) for each in found)


def called_gated(x: Tensor, gate: Any, up: Any, activation: str) -> Tensor:
    """activation(gate(x)) * up(x), [B, T, N] of x [B, T, K]."""
    found = _matrices(x, (gate, up))
    if found and _is_one(x) and found[0].bias is found[1].bias is None:
        return gated_products(x, found[0].weight, found[1].weight, activation, _scales(found))
    first, second = called(x, gate, up)
    if (first.dtype, first.shape) != (second.dtype, second.shape):  # as some wrapped ones give
        return ACTIVATIONS[activation](first) * second
    # A product that nobody else has: the result takes its place.
    return gated(first, second, activation, first if found or is_plain(gate, x) else None)


def called_gated_halves(x: Tensor, module: Any, activation: str) -> Tensor:
    """The same of a module whose outputs are those of gate and of up."""
    found = _matrices(x, (module,))
    if found and _is_one(x) and found[0].bias is None:
        gate, up = found[0].weight.chunk(2)
        scales = () if found[0].scale is None else found[0].scale.chunk(2)
        return gated_products(x, gate, up, activation, scales)
    both = called(x, module)[0].chunk(2, -1)
    return gated(both[0], both[1], activation)


def is_plain(module: Any, x: Tensor) -> bool:
    """Whether a module is a linear one whose weight is in memory as kernels read it, in x's
    dtype."""
    found = _matrix(module, x)
    return found is not None and found.scale is None


def runs_more(module: Any) -> bool:
    """Whether a call of the module runs anything but what its class does."""
    of_all = every_module._global_forward_pre_hooks, every_module._global_forward_hooks
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hooks += [hook for hooks_of_all in of_all for hook in hooks_of_all.values()]
    files = [str(getattr(hook, "func", hook).__module__) for hook in hooks]
    return "forward" in vars(module) or any(not file.startswith(_OURS) for file in files)


def _is_one(x: Tensor) -> bool:
    """Whether x is one token's vector."""
    return x.shape[:2] == (1, 1)


def _matrices(x: Tensor, modules: Sequence[Any]) -> list[Matrix] | None:
    """Those of all modules; None if not all have one, or some are in FP8 and some are not. None,
    too, for several tokens of plain modules, which are called."""
    if not _is_one(x) and type(getattr(modules[0], "weight", None)) is nn.Parameter:
        return None
    found = [matrix for matrix in (_matrix(each, x) for each in modules) if matrix is not None]
    alike = len({matrix.scale is None for matrix in found}) == 1
    return found if alike and len(found) == len(modules) else None


def _matrix(module: Any, x: Tensor) -> Matrix | None:
    """A linear module's weight, if nothing but that and its bias counts and kernels can read it."""
    if type(module) is not nn.Linear or runs_more(module):
        return None
    weight = module.weight
    if weight.dtype != x.dtype:
        return None
    if type(weight) is nn.Parameter:
        return Matrix(weight, module.bias) if weight.is_contiguous() else None
    return _fp8_matrix(weight, module.bias) if is_fp8(weight) else None


def _fp8_matrix(weight: Any, bias: Tensor | None) -> Matrix | None:
    codes, scale = weight.qdata, weight.scale
    fits = rounds_rows(weight) and codes.dtype == torch.float8_e4m3fn and codes.is_contiguous()
    fits = fits and scale.shape == (len(codes), 1) and scale.is_contiguous()
    fits = fits and weight.dtype == torch.bfloat16 and not any(n % _FP8_SIZES for n in codes.shape)
    fits = fits and (bias is None or bias.dtype == weight.dtype)
    return Matrix(codes, bias, scale) if fits else None


def _scales(found: Sequence[Matrix]) -> list[Tensor]:
    return [matrix.scale for matrix in found if matrix.scale is not None]


def _fp8_product(x: Tensor, codes: Tensor, scales: Tensor, matrix: Matrix) -> Tensor:
    """x @ weight.T + bias, of x's rows in FP8."""
    assert matrix.scale is not None
    made = torch._scaled_mm(
        codes,
        matrix.weight.t(),
        scale_a=scales,
        scale_b=matrix.scale.t(),
        bias=matrix.bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return made.view(*x.shape[:-1], -1)
