"""8-bit floats (e4m3) with a scale: keys per channel of a run, values per token.

code = e4m3(x / scale), scale = largest |x| / 448, 448 being e4m3's largest number. Error: at most
2 ** -4 of |x| or, near zero, 2 ** -10 of the scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from locret.quantization.affine import as_stored, refuse_unstorable
from locret.quantization.base import Parts, Scheme

LAST = 448.0
SMALLEST_SCALE = 2.0**-14  # float16's smallest normal: below it a scale would lose precision


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
