"""8-bit floats (e4m3) with a scale: keys per channel of a run, values per token.

code = e4m3(x / scale), scale = largest |x| / 448, 448 being e4m3's largest number. Error: at most
2 ** -4 of |x| or, near zero, 2 ** -10 of the scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locret.quantization.affine import as_stored, refuse_unstorable
from locret.quantization.base import Parts, Scheme

LAST = 448.0
SMALLEST_SCALE = 2.0**-14  # float16's smallest normal: below it a scale would lose precision
FAR_ABOVE_KEYS = 50.0  # of norms and projections as they are trained
LARGE_BIAS = 100  # times the typical one; Qwen2.5's largest is some 1,400 times, others up to 50


@dataclass(frozen=True)
class Fp8Scheme(Scheme):
    """Parts of a key: codes uint8 [D] (e4m3 bits) | scale float16 [D] a run.
    Parts of a value: codes uint8 [D], scale float16 [1]."""

    name = "fp8"
    widths = (8,)
    bits: int = 8

    def encode_keys(self, x: Tensor, usable: Tensor | None) -> tuple[Parts, Parts]:
        codes, scale = _encode(x, -2)
        return (codes,), (scale.squeeze(-2),)

    def decode_keys(self, units: Parts, rows: Parts, head_size: int) -> Tensor:
        return _decode(*units, *rows)

    def encode_values(self, x: Tensor, usable: Tensor | None) -> Parts:
        return _encode(x, -1)

    def decode_values(self, units: Parts, head_size: int) -> Tensor:
        return _decode(*units)


def _encode(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    x = as_stored(x)
    largest = x.abs().amax(dim, keepdim=True)
    refuse_unstorable(largest)
    scale = (largest / LAST).clamp(min=SMALLEST_SCALE).half()
    steps = (x / scale.float()).clamp(-LAST, LAST)
    return steps.to(torch.float8_e4m3fn).view(torch.uint8), scale


def _decode(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float() * scale.float()


def key_bias_warning(biases: Sequence[Tensor]) -> str | None:
    """Why keys may not survive the rounding: it is relative to a key's size, so that beside a large
    bias it takes away by what keys differ. None where no bias is large.

    Args:
        biases: what each layer's key projection adds, [H * D]; none where it adds nothing.
    """
    if not biases:
        return None
    largest = torch.stack([bias.detach().abs().max().float().cpu() for bias in biases])
    sizes = torch.cat([bias.detach().abs().float().cpu() for bias in biases])
    typical = sizes[sizes > 0].median()  # not a number where there are none, which is not large
    if largest.max() > LARGE_BIAS * typical:
        than = f"is {largest.max() / typical:.0f} times its typical one, {typical:.2g}"
    elif largest.max() > FAR_ABOVE_KEYS:
        than = "is far above what a token adds to a key, a few units"
    else:
        return None
    return (
        f"quantization 'fp8' keeps 4 significant bits of a key, its bias included, and the largest "
        f"key bias of this model, {largest.max():.3g}, {than}: what tells keys apart may be lost. "
        "Measured on "
        "Qwen2.5-Coder-1.5B, whose key biases are such: RULER needles found fell from 100 % to "
        "9.4 % with nothing evicted, and quantization 'kivi' of 8 and 4 bits kept 100 %; use it "
        "instead"
    )
