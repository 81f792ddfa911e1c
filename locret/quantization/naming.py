"""A store's tensors by name, and the store made of them again: what files hold."""

from torch import Tensor

from locret.quantization.base import Parts, Scheme
from locret.quantization.columns import Columns
from locret.quantization.outliers import Outliers
from locret.quantization.packed import PackedKeys, PackedValues
from locret.quantization.storage import QuantizedUnits

RESIDUAL = ("residual_keys", "residual_values")


def named_tensors(store: QuantizedUnits) -> dict[str, Tensor]:
    """All that `store` holds, without spare room."""
    named = dict(zip(RESIDUAL, store.residual, strict=True)) if store.held else {}
    keys, values = store.packed_keys, store.packed_values
    if keys is not None and values is not None:
        named |= _named("key_units", keys.units) | _named("key_rows", keys.rows)
        named |= {"key_starts": keys.starts} | _named("value_units", values.units)
        named |= _named("key_outliers", keys.outliers.tensors if keys.outliers else ())
        named |= _named("value_outliers", values.outliers.tensors if values.outliers else ())
    return named


def store_of(scheme: Scheme, named: dict[str, Tensor]) -> QuantizedUnits:
    """The store that `named_tensors` was told of; there may be other tensors among them."""
    store = QuantizedUnits(scheme)
    if RESIDUAL[0] not in named:
        return store
    store.residual = Columns([named[name] for name in RESIDUAL])
    size = store.residual_keys.shape[-1]
    if "key_starts" in named:
        store.packed_keys = PackedKeys(
            scheme,
            size,
            _parts("key_units", named),
            _parts("key_rows", named),
            named["key_starts"],
            _outliers("key_outliers", named),
        )
        store.packed_values = PackedValues(
            scheme, size, _parts("value_units", named), _outliers("value_outliers", named)
        )
    return store


def _named(name: str, parts: Parts) -> dict[str, Tensor]:
    return {f"{name}.{i}": part for i, part in enumerate(parts)}


def _parts(name: str, named: dict[str, Tensor]) -> Parts:
    count = sum(other.startswith(f"{name}.") for other in named)
    return tuple(named[f"{name}.{i}"] for i in range(count))


def _outliers(name: str, named: dict[str, Tensor]) -> Outliers | None:
    parts = _parts(name, named)
    return Outliers(*parts) if parts else None
