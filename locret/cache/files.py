"""Contexts on disk: read once, asked in another process.

A folder with `units.safetensors` (keys, values, scores, source positions of every layer) and
`context.json` (everything else, the model it belongs to, and a checksum of every tensor).
"""

import contextlib
import hashlib
import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn, uint8

from locret.cache.context import StoredContext, sequences_of
from locret.cache.layer import RetainedLayer
from locret.cache.merging import describe_merging, merging_of
from locret.cache.recall import recall_of
from locret.cache.store import NAMES, Store
from locret.heads.files import written_aside
from locret.quantization import SCHEMES, Scheme, describe_scheme, scheme_of
from locret.quantization.base import Tensors
from locret.quantization.codes import Outliers
from locret.quantization.packed import PackedKeys, PackedValues

SCHEMA = 3

UNITS, CONTEXT = "units.safetensors", "context.json"

CHECKSUMS = "crc32"
"""Where the record has what `checksum` gives of every tensor. Contexts saved by earlier versions
have none, and are read unchecked."""

REQUEST = ("budget", "prompt_lengths", "longrope", "query_length", "answered", "padding")
"""What a `RetainedCache` knows of its request, beside the tokens."""

_RECORDED = ("model", "positions", *REQUEST)

_OF_LAYERS = {"seen": "seen", "rotated": "rotated", "windows": "window"}
"""What the record says of every layer, and the layer's attribute."""

STORED = "stored"
"""How a model's description calls the kinds of its weights in fewer bits."""

EVICTED, STATE = "evicted.", "state."
"""How the names of a layer's evicted units begin, and of what a policy remembers."""


def describe(model: Any) -> dict[str, Any]:
    """What tells a model from others: its architecture, shapes, name, and a print of its weights.

    The print is a hash of the first values of some weights: enough to tell an instruct model from
    its base, at no cost.
    """
    config = model.config
    return {
        "model_type": config.model_type,
        "name": config.name_or_path or None,
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": _weights_print(model),
        STORED: _stored(model),
    }


def _stored(model: Any) -> list[str]:
    """The types of weights in fewer bits: the print of the others does not tell these apart."""
    kinds = {type(parameter) for parameter in model.parameters()} - {nn.Parameter}
    return sorted(kind.__name__ for kind in kinds)


def _weights_print(model: Any) -> str:
    digest = hashlib.sha256()
    # Quantized weights are tensors of other types, which do not give their values away as easily.
    owners = {
        parameter: (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.numel()
    }
    chosen = [*owners.values()]
    some = [chosen[0], chosen[len(chosen) // 2], chosen[-1]]
    for layer in adapted_layers(model):
        digest.update(repr(layer.active_adapters).encode())
        if layer.disable_adapters:
            digest.update(b"disabled")
        base = set(layer.base_layer.parameters())
        some += [owners[p] for p in layer.parameters() if p in owners and p not in base]
    for module, name in some:
        digest.update(_first_values(module, name).numpy().tobytes())
    return digest.hexdigest()[:16]


def adapted_layers(model: Any) -> list[Any]:
    """The layers to which a PEFT adapter adds something."""
    return [
        m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "active_adapters")
    ]


def _first_values(module: Any, name: str) -> Tensor:
    """Of one weight, wherever it lies: float32, on the CPU."""
    fetched = contextlib.nullcontext()
    if getattr(module, name).device.type == "meta":
        from accelerate.utils import align_module_device  # nothing else leaves weights there

        fetched = align_module_device(module)
    with fetched:
        return getattr(module, name).detach().flatten()[:32].float().cpu()


def save(cache: Any, path: str | Path) -> None:
    """Write a `RetainedCache` to the folder `path` (`RetainedCache.save`), aside first: there is
    the whole of it or nothing."""
    if not cache.seen or cache.token_ids is None:
        raise ValueError("the cache holds no context to save, or one that beams have mixed up")
    if SCHEMES.get(cache.scheme.name) is not type(cache.scheme):
        raise ValueError(
            f"{type(cache.scheme).__name__} is not in locret.quantization.SCHEMES, where "
            "loading looks for it; add it there under its name"
        )
    path = Path(path)
    if path.exists() and not (path / CONTEXT).is_file():
        raise ValueError(f"{path} exists and is not a saved context; choose another path")
    tensors = {"token_ids": cache.token_ids, "unread_ids": cache.unread_ids}
    for i, layer in enumerate(cache.layers):
        tensors |= {f"{i}.{name}": tensor for name, tensor in _layer_tensors(layer).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    record = {"schema": SCHEMA} | {name: getattr(cache, name) for name in _RECORDED}
    record |= {name: [getattr(x, own) for x in cache.layers] for name, own in _OF_LAYERS.items()}
    record["lengths"] = [lengths_of(layer.store) for layer in cache.layers]
    record |= {
        "quantization": describe_scheme(cache.scheme),
        "merging": describe_merging(cache.merging),
        "recall": asdict(cache.recall) if cache.recall else None,
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        CHECKSUMS: {name: checksum(tensor) for name, tensor in tensors.items()},
    }
    with written_aside(path) as aside:
        save_file(tensors, aside / UNITS)
        (aside / CONTEXT).write_text(json.dumps(record, indent=1), encoding="utf-8")


def load(kind: Any, path: str | Path, model: Any) -> Any:
    """The `RetainedCache`, which is `kind`, that was saved at `path` (`RetainedCache.load`)."""
    stock = model.get_base_model() if hasattr(model, "get_base_model") else model
    record, tensors = _read(Path(path), stock)
    # Layers that are elsewhere take their units there when they run.
    device = "cpu" if stock.device.type == "meta" else stock.device
    try:
        return _cache_of(kind, record, tensors, device)
    except (KeyError, IndexError, TypeError) as error:
        file = Path(path) / CONTEXT
        raise ValueError(f"{file} is damaged ({error}); save the context again") from error


def _cache_of(kind: Any, record: dict[str, Any], tensors: dict[str, Tensor], device: Any) -> Any:
    cache = kind(
        len(record["seen"]),
        positions=record["positions"],
        windows=record["windows"],
        scheme=scheme_of(record["quantization"]),
        merging=merging_of(record["merging"]),
        recall=recall_of(record["recall"]),
    )
    for name in _RECORDED:
        setattr(cache, name, _as_tuple(record[name]))
    cache.token_ids, cache.unread_ids = tensors.pop("token_ids"), tensors.pop("unread_ids")
    for i, layer in enumerate(cache.layers):
        for name, own in _OF_LAYERS.items():
            setattr(layer, own, _as_tuple(record[name][i]))
        lengths = {name: _as_tuple(x) for name, x in record["lengths"][i].items()}
        _take_tensors(layer, _under(f"{i}.", tensors), lengths, device)
    return cache


def _as_tuple(value: Any) -> Any:
    """JSON has lists where the cache has tuples."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _under(start: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `start`, without it."""
    return {name.removeprefix(start): x for name, x in named.items() if name.startswith(start)}


def _layer_tensors(layer: RetainedLayer) -> dict[str, Tensor]:
    """All that a layer holds, without spare room."""
    named = named_tensors(layer.store)
    if layer.host:
        named |= {f"{EVICTED}{name}": x for name, x in layer.host.named_tensors().items()}
    return named | {f"{STATE}{name}": value for name, value in layer.state.items()}


def _take_tensors(
    layer: RetainedLayer, named: dict[str, Tensor], lengths: dict[str, Any], device: Any
) -> None:
    """Let a new layer hold what `_layer_tensors` gave, in sequences of these lengths, on `device`
    but for what waits on the host."""
    named = {
        name: tensor if name.startswith(f"{EVICTED}host.") else tensor.to(device)
        for name, tensor in named.items()
    }
    take_tensors(layer.store, named, lengths)
    if layer.host:
        layer.host.take_tensors(_under(EVICTED, named))
    layer.state = _under(STATE, named)


def _read(path: Path, model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of the context saved at `path`; the tensors on the CPU. ValueError: no
    context there, a damaged one, or one of another model; says which."""
    record = _read_record(path)
    check_model(path, record["model"], describe(model))
    tensors = _read_tensors(path)
    expected, found = record["tensors"], {n: [*t.shape] for n, t in tensors.items()}
    if expected != found:
        differing = [n for n in expected | found if expected.get(n) != found.get(n)]
        raise ValueError(
            f"{path / UNITS} does not go with {CONTEXT}: {', '.join(sorted(differing)[:3])} of "
            f"{len(differing)} tensors that differ; save the context again"
        )
    if CHECKSUMS in record:
        _check_bytes(path, record[CHECKSUMS], tensors)
    return record, tensors


def checksum(tensor: Tensor) -> int:
    """The CRC-32 of a tensor's type and bytes. The tensor is contiguous, on the CPU, of any shape
    and dtype; its bytes are read where they lie."""
    start = zlib.crc32(str(tensor.dtype).encode())
    return zlib.crc32(tensor.reshape(-1).view(uint8).numpy().data, start)


def _check_bytes(path: Path, recorded: Any, tensors: dict[str, Tensor]) -> None:
    """ValueError: some tensor is not what was saved; says which."""
    if not isinstance(recorded, dict) or recorded.keys() != tensors.keys():
        raise ValueError(
            f"{path / CONTEXT} is damaged ({CHECKSUMS} does not have a number for every tensor); "
            "read the prompt again and save its context anew"
        )
    for name, tensor in tensors.items():
        if (found := checksum(tensor)) != recorded[name]:
            raise ValueError(
                f"{path / UNITS} is damaged: {name} has the checksum {found}, and {CONTEXT} says "
                f"{recorded[name]!r}; read the prompt again and save its context anew"
            )


def _read_record(path: Path) -> dict[str, Any]:
    file = path / CONTEXT
    if not file.is_file():
        raise ValueError(f"{path} is not a saved context: it has no {CONTEXT}")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema = record["schema"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); save the context again") from None
    if schema != SCHEMA:
        raise ValueError(f"{file} has schema {schema}; this version reads {SCHEMA}")
    for name in ("model", "tensors"):
        if not isinstance(record.get(name), dict):
            raise ValueError(f"{file} is damaged (no {name}); save the context again")
    return record


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / UNITS
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut ({error}); save the context again") from None


def check_model(context: str | Path, recorded: dict[str, Any], given: dict[str, Any]) -> None:
    """Whether a context belongs to the model `given`, by what `describe` says of both. ValueError:
    it does not; says in what they differ."""
    recorded = {STORED: given[STORED]} | recorded  # contexts from before do not say it
    differences = [
        f"{what} {recorded.get(what)!r} there, {given[what]!r} here"
        for what in given
        if what != "name" and recorded.get(what) != given[what]
    ]
    if differences:
        raise ValueError(
            f"{context} is a context of another model ({recorded.get('name') or 'not named'}; "
            f"this one is {given['name'] or 'not named'}): {'; '.join(differences)}"
        )


def named_tensors(store: Store) -> dict[str, Tensor]:
    """What a store holds, by name, without spare room."""
    named = {f"tail.{name}": x for name, x in zip(store.names, store.tail, strict=False)}
    context = store.context
    if context is not None:
        named |= {"keys": context.keys, "values": context.values} | context.in_full
        named |= to_named(context.packed_keys, context.packed_values)
    return named


def lengths_of(store: Store) -> dict[str, Any]:
    """How many units the context's sequences have, for `take_tensors`."""
    context = store.context
    if context is None:
        return {}
    counts = {name: getattr(context, name).counts for name in ("sequences", "packed", "plain")}
    return counts | {"appended": context.appended, "closed": context.positions is not None}


def take_tensors(store: Store, named: dict[str, Tensor], counts: dict[str, Any]) -> None:
    """Let a store hold what `named_tensors` gave, which may be among other things, and
    `lengths_of` did."""
    store.clear()
    if "tail.keys" in named:
        store.names = tuple(name for name in NAMES if f"tail.{name}" in named)
        store.tail.append([named[f"tail.{name}"] for name in store.names])
    if not counts:
        return
    store.names = tuple(name for name in NAMES if name in named)
    keys, values, device = named["keys"], named["values"], named["keys"].device
    whole, packed, plain = (
        sequences_of(counts[name], device) for name in ("sequences", "packed", "plain")
    )
    exact = {name: named[name] for name in store.names[2:]}
    both = from_named(store.scheme, keys.shape[-1], named)
    own = (whole, packed, plain, keys, values, exact)
    context = StoredContext(*own, *both, appended=counts["appended"])
    store.context = context.closed() if counts.get("closed") else context


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
