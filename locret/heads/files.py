"""Files of a heads artifact: our folder, the released `.bin`, those of other methods, and all of
them on the Hub. Tensors in, tensors out.

Ours is a folder with `heads.safetensors` (`layers.{i}.fc1.weight`, `layers.{i}.fc2.weight`; other
kinds of heads: the names of their parameters), `config.json` (`locret.heads.heads.HeadsConfig`) and
a model card, and `custom_generate/` for stock `generate`; beside them may lie `training.yaml`,
`training.png` and small files with figures, which are published too. The released format is a torch
file with `model.layers.{i}.self_attn.fc1.weight` and `fc2.weight`, alone or in a whole-model dict.

KVzap (arXiv 2601.07891) writes `config.json` of model type "kvzap" and `model.safetensors`: a
matrix or an MLP with GELU a layer, with biases. Fast KVzip (arXiv 2601.17668) writes a torch file
that has the parameters of each layer's gate (`locret.heads.kinds.GateHead`) in a list "module".
Both read `hidden` and keep positions as they were. What surrounds them in these methods are
settings of ours: the last tokens that are always kept are `stabilizers` and `local_tokens`, a
threshold is a budget.

Loading never executes code. Saving writes aside and renames: a failed save changes nothing.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from locret.heads import hub
from locret.heads.hub import CARD, CUSTOM, CUSTOM_FILES, TRAINING, Facts, has_own_card, model_card
from locret.system.files import as_json, check_named

WEIGHTS = "heads.safetensors"
RECORD = "config.json"
FIGURES = (".png", ".json", ".csv")
MAX_FIGURE_BYTES = 4 * 2**20

KVZAP = "kvzap"
FAST_KVZIP = "fast_kvzip"
KVZAP_WEIGHTS = "model.safetensors"

_KVZAP_TENSOR = re.compile(r"layers\.(\d+)\.(?:(\d+)\.)?(weight|bias)")
_KVZAP_MATRIX = {None: "fc", "0": "fc1", "2": "fc2"}
"""Our name of a matrix by its place in their layer; None where the layer is the matrix."""

_OF_BOTH = {"tap": "hidden", "positions": "original", "license": "other"}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OURS = re.compile(r"layers\.(\d+)\.(fc[12])\.weight")
_RELEASED = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.(fc[12])\.weight")
_FILE_ON_HUB = re.compile(r"([^/]+/[^/]+)/(.+\.pt)")


def load(
    source: str | Path, *, revision: str | None = None, token: str | None = None
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Read an artifact folder, a released `.bin`, heads of other methods, or a Hub repository
    with any of them.

    Returns:
        The record (None for torch files, which have none) and the tensors; KVzap's are both as it
        writes them, all others under our names.

    Raises:
        ValueError: nothing usable there; says what was looked for.
    """
    path = locate(source, revision=revision, token=token)
    if path.is_file():
        return None, _load_released(path)
    weights = _weights_in(path)
    if (path / weights).is_file():
        try:
            return _load_record(path / RECORD), load_file(path / weights)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path / weights} is truncated or corrupted: {error}") from error
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    released = [name for name in names if name.endswith(".bin")]
    if len(released) == 1:
        return None, _load_released(path / released[0])
    raise ValueError(
        f"{source}: neither {WEIGHTS} nor a single .bin file in this folder; found {names}"
    )


def locate(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The file or folder of an artifact on this machine, downloaded if `source` is a Hub id."""
    check_named(source, "the name of the heads")
    path = Path(source)
    if path.exists():
        return path
    file = _FILE_ON_HUB.fullmatch(str(source))
    if file:
        return hub.download(file[1], patterns=[file[2]], revision=revision, token=token) / file[2]
    patterns = [WEIGHTS, RECORD, "*.bin"]
    folder = hub.download(str(source), patterns=patterns, revision=revision, token=token)
    if _weights_in(folder) != KVZAP_WEIGHTS:  # elsewhere a file of this name may be a whole model
        return folder
    patterns = [KVZAP_WEIGHTS, RECORD]
    return hub.download(str(source), patterns=patterns, revision=revision, token=token)


def _weights_in(folder: Path) -> str:
    record = folder / RECORD
    return KVZAP_WEIGHTS if record.is_file() and is_kvzap(_load_record(record)) else WEIGHTS


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Compare names, shapes and values with what heads need; a ValueError names every tensor that
    is missing, extra, misshapen or not finite."""
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"extra {name}" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        if tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} is {tuple(tensor.shape)}, expected {expected[name]}")
        elif tensor.dtype not in _DTYPES:
            problems.append(f"{name} is {tensor.dtype}, expected one of {_DTYPES}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} holds values that are not finite numbers")
    if problems:
        raise ValueError(f"heads from {source} do not fit their config: {'; '.join(problems)}")


def save_folder(
    folder: str | Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    """Write the artifact folder. A failure changes nothing.

    Other files in it are left alone, and so are a card that somebody wrote or edited, and
    `custom_generate/` where it is there.
    """
    check_named(folder, "the folder of the heads")
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected a folder to write the heads to")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_aside(folder) as aside:
        try:
            save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # also what a full disk gives
            raise OSError(f"could not write {folder / WEIGHTS}: {error}") from error
        (aside / RECORD).write_text(_record_text(record), encoding="utf-8")
        if not has_own_card(folder):
            (aside / CARD).write_text(model_card(record), encoding="utf-8")
        if not (folder / CUSTOM).exists():
            (aside / CUSTOM).mkdir()
            for name, text in CUSTOM_FILES.items():
                (aside / name).write_text(text, encoding="utf-8")
        # safetensors writes files that only their owner may read
        (aside / WEIGHTS).chmod((aside / RECORD).stat().st_mode)
    return folder


def save_record(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write the record of an artifact folder anew, and its card, unless that is somebody's own."""
    folder = Path(folder)
    with written_aside(folder) as aside:
        (aside / RECORD).write_text(_record_text(record), encoding="utf-8")
        if not has_own_card(folder):
            card = model_card(record, _facts(folder))
            (aside / CARD).write_text(card, encoding="utf-8")


def _record_text(record: Mapping[str, Any]) -> str:
    """Indented JSON; where there are quotas, with those of a layer on one line."""
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    return as_json(json.loads(text)) if record.get("quotas") else text


def save_released(path: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write the released format: a torch dict of `model.layers.{i}.self_attn.fc{1,2}.weight`."""
    path = Path(path)
    named = {
        _OURS.sub(r"model.layers.\1.self_attn.\2.weight", name): tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    with written_aside(path.parent) as aside:
        try:
            torch.save(named, aside / path.name)
        except RuntimeError as error:  # also what a full disk gives
            reason = str(error).partition("\n")[0]
            raise OSError(f"could not write {path}: {reason}") from error
    return path


def write_card(folder: str | Path, repo_id: str | None = None) -> None:
    """Write the card anew with what lies beside the heads by now, unless it is somebody's own."""
    folder = Path(folder)
    if not has_own_card(folder):
        with written_aside(folder) as aside:
            (aside / CARD).write_text(_card(folder, repo_id), encoding="utf-8")


def publishable(
    folder: str | Path, repo_id: str
) -> tuple[list[CommitOperationAdd], dict[str, str]]:
    """What of an artifact folder goes to the Hub, and what does not.

    Returns:
        The files to upload, the card with the address that they will have; and by name the reason
        why another file of the folder stays.

    Raises:
        ValueError: no artifact folder.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} is no artifact folder: it has no {WEIGHTS}. Heads from elsewhere become one "
            f"with python -m locret convert {folder} FOLDER"
        )
    files, left_out = [], {}
    for path in sorted(folder.iterdir()):
        reason = _reason_to_stay(path)
        if reason:
            left_out[path.name] = reason
        elif path.name not in (CARD, CUSTOM):
            files.append(CommitOperationAdd(path.name, path))
    for name, text in CUSTOM_FILES.items():  # artifacts of earlier versions lack them
        has_own = (folder / name).is_file()
        files.append(CommitOperationAdd(name, folder / name if has_own else text.encode("utf-8")))
    own = has_own_card(folder)
    card = (folder / CARD).read_bytes() if own else _card(folder, repo_id).encode("utf-8")
    return [CommitOperationAdd(CARD, card), *files], left_out


def inventory(source: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Figures of heads, tensors by name, and of the file or folder that they were read from.

    Returns:
        `parameters`, `bytes`, `dtypes`, `files` (bytes by name), and `layers`: for each its number
        as `layer`, and by name (`fc1`, `fc1.bias`, ...) the Frobenius norms of its tensors.
    """
    path = Path(source)
    found = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    layers: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        _, i, of_layer = name.split(".", 2)
        norms = layers.setdefault(int(i), {"layer": int(i)})
        norms[of_layer.removesuffix(".weight")] = tensor.double().norm().item()
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "files": {file.name: file.stat().st_size for file in found},
        "layers": [layers[i] for i in sorted(layers)],
    }


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A scratch folder: its files move into `folder` when the block ends well, else vanish."""
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as aside:
            yield Path(aside)
            _move_in(Path(aside), folder)
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _move_in(aside: Path, folder: Path) -> None:
    """Move all files of `aside` into `folder`, those of its folders too, or, if one fails, put back
    what was there."""
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    before = aside / "before"
    before.mkdir()
    with contextlib.ExitStack() as undo:
        for number, file in enumerate(files):
            target, copy = folder / file.relative_to(aside), before / str(number)
            if not target.parent.exists():
                target.parent.mkdir()
                undo.callback(target.parent.rmdir)
            if target.exists():
                shutil.copy2(target, copy)
                put_back = functools.partial(os.replace, copy, target)
            else:
                put_back = functools.partial(target.unlink, missing_ok=True)
            os.replace(file, target)
            undo.callback(put_back)
        undo.pop_all()


def _reason_to_stay(path: Path) -> str | None:
    """Why a file of an artifact folder is not published; None if it is."""
    if path.name == CUSTOM:
        return None
    if not path.is_file():
        return "not a file"
    if path.name in (WEIGHTS, RECORD, CARD, TRAINING):
        return None
    if path.name.startswith(".") or path.suffix not in FIGURES:
        return "not part of an artifact"
    if path.stat().st_size > MAX_FIGURE_BYTES:
        return f"over {MAX_FIGURE_BYTES // 2**20} MiB"
    return None


def _card(folder: Path, repo_id: str | None) -> str:
    """The card of the artifact in a folder, with what lies beside it."""
    return model_card(_load_record(folder / RECORD), _facts(folder, repo_id))


def _facts(folder: Path, repo_id: str | None = None) -> Facts:
    published = (path.name for path in sorted(folder.iterdir()) if _reason_to_stay(path) is None)
    figures = (name for name in published if name.endswith(FIGURES) and name != RECORD)
    return Facts.beside(folder, repo_id, tuple(figures))


def _load_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has {WEIGHTS} but no {RECORD}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds {type(record).__name__}; expected a JSON object")
    return record


def _load_released(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise ValueError(
            f"{path} is not a torch file of plain tensors (truncated, or it holds code, "
            f"which is never run): {error}"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds {type(state).__name__}; expected a dict of tensors")
    gates = gates_in(state)
    if gates is not None:
        return gates
    heads: dict[str, Tensor] = {}
    for name, value in state.items():
        match = _RELEASED.fullmatch(name) if isinstance(name, str) else None
        if match and isinstance(value, Tensor):
            heads[f"layers.{match[1]}.{match[2]}.weight"] = value
    if not heads:
        raise ValueError(
            f"{path} has no tensor named like model.layers.0.self_attn.fc1.weight; "
            f"its first names: {list(state)[:3]}"
        )
    return heads


# ---- other methods -------------------------------------------------------------------------------


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
