"""The tensors of packed keys and values by name, for files."""

from torch import Tensor

from locret.quantization.base import Scheme, Tensors
from locret.quantization.codes import Outliers
from locret.quantization.packed import PackedKeys, PackedValues


def to_named(keys: PackedKeys | None, values: PackedValues | None) -> dict[str, Tensor]:
    """All tensors by name, for files."""
    if keys is None or values is None:
        return {}
    named = {
        "key_units": keys.units,
        "key_tables": keys.tables,
        "key_outliers": keys.outliers.tensors if keys.outliers else (),
        "value_units": values.units,
        "value_outliers": values.outliers.tensors if values.outliers else (),
    }
    flat = {f"{name}.{i}": x for name, tensors in named.items() for i, x in enumerate(tensors)}
    return flat | {"key_starts": keys.starts}


def from_named(
    scheme: Scheme, head_size: int, named: dict[str, Tensor]
) -> tuple[PackedKeys | None, PackedValues | None]:
    """What `to_named` was told of; there may be other tensors among them."""
    if "key_starts" not in named:
        return None, None

    def tensors(name: str) -> Tensors:
        count = sum(other.startswith(f"{name}.") for other in named)
        return tuple(named[f"{name}.{i}"] for i in range(count))

    found = [tensors(f"{side}_outliers") for side in ("key", "value")]
    of_keys, of_values = (Outliers(*each) if each else None for each in found)
    tables = tensors("key_tables"), named["key_starts"]
    keys = PackedKeys(scheme, head_size, tensors("key_units"), of_keys, *tables)
    return keys, PackedValues(scheme, head_size, tensors("value_units"), of_values)
