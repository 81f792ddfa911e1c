"""Units of a few bits, as the kernels take them.

KIVI (arXiv 2402.02750): keys per channel of a run of units, values per unit and group of channels.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PackedUnits:
    """Keys and values of P units, x = minimum + scale * code.

    Codes are planar: of the M = ceil(D * bits / 8) bytes of a unit, bits [i * bits, (i + 1) * bits)
    of byte j are channel i * M + j. Any strides, elements of the last axis side by side.

    Attributes:
        key_codes, value_codes: uint8 [B, H, P, M].
        key_scale, key_minimum: float16 [B, H, G, D], a row for each run of units.
        key_starts: int32 [B, H, G + 1]; run i is the units key_starts[i] <= u < key_starts[i + 1],
            the first start is 0, the last P; runs may be empty.
        value_scale, value_minimum: float16 [B, H, P, ceil(D / group)].
        bits: 8, 4 or 2.
        group: channels that share a scale of a value, and about the most units of a run.
    """

    key_codes: Tensor
    key_scale: Tensor
    key_minimum: Tensor
    key_starts: Tensor
    value_codes: Tensor
    value_scale: Tensor
    value_minimum: Tensor
    bits: int
    group: int

    @property
    def count(self) -> int:
        """P."""
        return self.key_codes.shape[2]
