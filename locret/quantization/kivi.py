"""KIVI (arXiv 2402.02750): keys per channel, values per token, asymmetric.

A few channels of the keys are large in every token, so keys share a scale along tokens (section
3.2: groups of `group` units, one scale and minimum a channel). Values have no such channels and
share a scale along the channels of one token, so that an error stays with its token. The last
`residual` units stay in full precision (section 3.3).
"""

from torch import Tensor
from torch.nn.functional import pad

from locret.kernels import expand_units
from locret.kernels.dispatch import takes_triton
from locret.quantization.affine import dequantize, quantize
from locret.quantization.base import Parts, Scheme
from locret.quantization.packing import pack, unpack


class KiviScheme(Scheme):
    """Parts of a key: codes uint8 [packed D] | scale, minimum float16 [D] a run.
    Parts of a value: codes uint8 [packed D], scale, minimum float16 [ceil(D / group)]."""

    name = "kivi"

    def encode_keys(self, x: Tensor, usable: Tensor | None) -> tuple[Parts, Parts]:
        codes, scale, minimum = quantize(x, self.bits, -2, usable)
        return (pack(codes, self.bits),), (scale.squeeze(-2), minimum.squeeze(-2))

    def decode_keys(self, units: Parts, rows: Parts, head_size: int) -> Tensor:
        return dequantize(unpack(units[0], self.bits, head_size), *rows)

    def encode_values(self, x: Tensor, usable: Tensor | None) -> Parts:
        grouped = self._grouped(x)
        size = x.shape[-1]
        if usable is not None or grouped.numel() != x.numel():
            usable = self._grouped(x.new_ones(size).bool() if usable is None else usable)
        codes, scale, minimum = quantize(grouped, self.bits, -1, usable)
        codes = codes.flatten(-2)[..., :size]
        return pack(codes, self.bits), scale.squeeze(-1), minimum.squeeze(-1)

    def decode_values(self, units: Parts, head_size: int) -> Tensor:
        codes, scale, minimum = units
        grouped = self._grouped(unpack(codes, self.bits, head_size))
        x = dequantize(grouped, scale[..., None], minimum[..., None])
        return x.flatten(-2)[..., :head_size]

    def expand_keys(self, units: Parts, rows: Parts, starts: Tensor, out: Tensor) -> bool:
        if not takes_triton(out):
            return False
        (codes,), (scale, minimum) = units, rows
        expand_units(codes, scale, minimum, self.bits, self.group, out, starts)
        return True

    def expand_values(self, units: Parts, out: Tensor) -> bool:
        if not takes_triton(out):
            return False
        codes, scale, minimum = units
        expand_units(codes, scale, minimum, self.bits, self.group, out)
        return True

    def _grouped(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., groups, group], padded with zeros."""
        size = min(self.group, x.shape[-1])
        return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
