"""Quantized storage of keys and values. `docs/quantization.md` has the formulas and the layout."""

from locret.quantization.base import Scheme
from locret.quantization.schemes import (
    NO_SCHEME,
    SCHEMES,
    Quantization,
    describe_scheme,
    make_scheme,
    scheme_of,
)

__all__ = [
    "NO_SCHEME",
    "SCHEMES",
    "Quantization",
    "Scheme",
    "describe_scheme",
    "make_scheme",
    "scheme_of",
]
