"""Contexts on disk: read once, asked in another process.

A folder with `units.safetensors` (keys, values, scores, source positions of every layer) and
`context.json` (everything else, and the model it belongs to).
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from locret.heads.files import written_aside

SCHEMA = 2
UNITS, CONTEXT = "units.safetensors", "context.json"


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
    }


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
    for layer in _adapted(model):
        digest.update(repr(layer.active_adapters).encode())
        if layer.disable_adapters:
            digest.update(b"disabled")
        base = set(layer.base_layer.parameters())
        some += [owners[p] for p in layer.parameters() if p in owners and p not in base]
    for module, name in some:
        digest.update(_first_values(module, name).numpy().tobytes())
    return digest.hexdigest()[:16]


def _adapted(model: Any) -> list[Any]:
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


def write(path: str | Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a context to the folder `path`, aside first: there is the whole of it or nothing.

    Raises:
        ValueError: the path is taken by something else.
    """
    path = Path(path)
    if path.exists() and not (path / CONTEXT).is_file():
        raise ValueError(f"{path} exists and is not a saved context; choose another path")
    with written_aside(path) as aside:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, aside / UNITS)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        text = json.dumps({"schema": SCHEMA} | record | {"tensors": shapes}, indent=1)
        (aside / CONTEXT).write_text(text, encoding="utf-8")


def read(path: str | Path, model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of the context saved at `path`; the tensors on the CPU.

    Raises:
        ValueError: no context there, a damaged one, or one of another model; says which.
    """
    path = Path(path)
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
    return record, tensors


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
    """Whether a context belongs to the model `given`, by what `describe` says of both.

    Raises:
        ValueError: it does not; says in what they differ.
    """
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
