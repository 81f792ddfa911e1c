"""Heads of other methods, read from their own files.

KVzap (arXiv 2601.07891) writes `config.json` of model type "kvzap" and `model.safetensors`: a
matrix or an MLP with GELU a layer, with biases. Fast KVzip (arXiv 2601.17668) writes a torch file
that has the parameters of each layer's gate (`locret.heads.kinds.GateHead`) in a list "module".

All read the input of the attention layer, after its norm: `hidden`. KVzap's scores are logarithms
of attention weighted by values, relative to the hidden state; a gate's are probabilities. Both keep
positions as they were. What surrounds them in these methods are settings of ours: the last tokens
that are always kept are `stabilizers` and `local_tokens`, a threshold is a budget.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

KVZAP = "kvzap"
FAST_KVZIP = "fast_kvzip"
KVZAP_WEIGHTS = "model.safetensors"

_KVZAP_TENSOR = re.compile(r"layers\.(\d+)\.(?:(\d+)\.)?(weight|bias)")
_KVZAP_MATRIX = {None: "fc", "0": "fc1", "2": "fc2"}
"""Our name of a matrix by its place in their layer; None where the layer is the matrix."""

_OF_BOTH = {"tap": "hidden", "positions": "original", "license": "other"}


def is_kvzap(record: Mapping[str, Any]) -> bool:
    """Whether this `config.json` is KVzap's."""
    return record.get("model_type") == KVZAP


def kvzap(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What KVzap's files say, in our terms: the fields of `locret.heads.heads.HeadsConfig`, and the
    tensors under our names. ValueError if the record lacks a field."""
    needed = ("n_modules", "input_dim", "output_dim")
    missing = [name for name in needed if name not in record]
    if missing:
        raise ValueError(f"KVzap's config.json lacks {missing}; expected {list(needed)}")
    width = record.get("hidden_dim")
    fields = _OF_BOTH | {
        "origin": KVZAP,
        "num_layers": record["n_modules"],
        "num_kv_heads": record["output_dim"],
        "input_width": record["input_dim"],
        "hidden_size": record["input_dim"],
        "kind": "linear" if width is None else "mlp",
        "width": width,
        "bias": True,
        "activation": "gelu",
        "label": "log_value_share",
    }
    return fields, {_kvzap_name(name): tensor for name, tensor in tensors.items()}


def _kvzap_name(name: str) -> str:
    """Our name of a tensor; its own if it is none that belongs there."""
    match = _KVZAP_TENSOR.fullmatch(name)
    if match is None or match[2] not in _KVZAP_MATRIX:
        return name
    return f"layers.{match[1]}.{_KVZAP_MATRIX[match[2]]}.{match[3]}"


def gates_in(state: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of Fast KVzip's gates in a torch file, as `layers.{i}.{parameter}`; None if it
    holds none."""
    layers = state.get("module")
    if not isinstance(layers, list) or not all(isinstance(layer, Mapping) for layer in layers):
        return None
    return {
        f"layers.{i}.{name}": tensor
        for i, layer in enumerate(layers)
        for name, tensor in layer.items()
        if isinstance(tensor, Tensor)
    }


def fast_kvzip(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The fields of `HeadsConfig` that the gates' shapes tell; None for tensors of other heads.
    ValueError if the first layer's tensors have not the shapes of a gate's."""
    base, projection = tensors.get("layers.0.k_base"), tensors.get("layers.0.q_proj.weight")
    if base is None or projection is None:
        return None
    if base.dim() != 4 or projection.dim() != 2 or not base.numel():
        raise ValueError(
            f"gates have k_base {tuple(base.shape)} and q_proj.weight {tuple(projection.shape)}; "
            "expected [KV heads, 1, sinks, width] and [query heads * width, hidden size]"
        )
    heads, _, sinks, width = base.shape
    return _OF_BOTH | {
        "origin": FAST_KVZIP,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in tensors),
        "num_query_heads": projection.shape[0] // width,
        "num_kv_heads": heads,
        "input_width": projection.shape[1],
        "hidden_size": projection.shape[1],
        "kind": "gate",
        "width": width,
        "sinks": sinks,
        "label": "max_prob",
    }
