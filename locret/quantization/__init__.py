"""Quantized storage of keys and values. `docs/quantization.md` has the formulas and the layout."""

from dataclasses import fields
from typing import Any

from locret.quantization.base import Scheme
from locret.quantization.fp8 import Fp8Scheme
from locret.quantization.kivi import KiviScheme
from locret.quantization.kvquant import KVQuantScheme
from locret.quantization.layerquant import LayerQuantScheme
from locret.quantization.none import NoScheme
from locret.quantization.storage import QuantizedUnits

__all__ = ["SCHEMES", "QuantizedUnits", "Scheme", "make_scheme"]

SCHEMES: dict[str, type[Scheme]] = {
    scheme.name: scheme
    for scheme in (NoScheme, KiviScheme, KVQuantScheme, LayerQuantScheme, Fp8Scheme)
}


def make_scheme(name: str | None, **options: Any) -> Scheme:
    """A scheme by name; None = "none".

    Raises:
        ValueError: there is no such scheme, or it has no such option or no such value of it.
    """
    name = name or NoScheme.name
    if name not in SCHEMES:
        raise ValueError(f"no quantization {name!r}; expected one of {', '.join(SCHEMES)}")
    known = [field.name for field in fields(SCHEMES[name])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"quantization {name!r} has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return SCHEMES[name](**options)
