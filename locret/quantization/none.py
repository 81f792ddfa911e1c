"""No quantization: every unit stays as it is."""

from dataclasses import dataclass

from locret.quantization.base import Scheme


@dataclass(frozen=True)
class NoScheme(Scheme):
    name = "none"
    packs = False
    widths = (16,)
    bits: int = 16
