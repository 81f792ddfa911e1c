"""Quantized storage of keys and values. `docs/quantization.md` has the formulas and the layout."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from locret.quantization.base import Scheme
from locret.quantization.fp8 import Fp8Scheme
from locret.quantization.kivi import KiviScheme
from locret.quantization.kvquant import KVQuantScheme
from locret.quantization.layerquant import LayerQuantScheme
from locret.quantization.none import NoScheme
from locret.quantization.storage import QuantizedUnits

__all__ = [
    "NO_SCHEME",
    "SCHEMES",
    "Quantization",
    "QuantizedUnits",
    "Scheme",
    "describe_scheme",
    "make_scheme",
    "scheme_of",
]

Quantization = str | Mapping[str, Any] | Scheme | None
"""How a user names a scheme: its name; a mapping of `name` and options, {"name": "kivi", "bits":
2}; a scheme; None = no quantization."""

NO_SCHEME = NoScheme()

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


def scheme_of(given: Quantization) -> Scheme:
    """The scheme that a user means. 16 bits of any scheme are no quantization.

    Raises:
        ValueError: there is no such scheme, or it has no such option or no such value of it.
    """
    if isinstance(given, Scheme):
        return given
    if given is None or isinstance(given, str):
        return make_scheme(given)
    if not isinstance(given, Mapping) or "name" not in given:
        raise ValueError(
            f"quantization is {given!r}; expected one of {', '.join(SCHEMES)}, a mapping such as "
            "{'name': 'kivi', 'bits': 4}, or a scheme of locret.quantization"
        )
    options = dict(given)
    name = options.pop("name")
    if options.get("bits") == NO_SCHEME.bits:
        make_scheme(name)  # must exist all the same
        return NO_SCHEME
    return make_scheme(name, **options)


def describe_scheme(scheme: Scheme) -> dict[str, Any]:
    """Its name and options; of a scheme in `SCHEMES`, `scheme_of` makes it again."""
    return {"name": scheme.name} | asdict(scheme)
