"""Files of a heads artifact: our folder, the released `.bin`, and the Hub. Tensors in, tensors out.

Ours is a folder with `heads.safetensors` (`layers.{i}.fc1.weight`, `layers.{i}.fc2.weight`),
`config.json` (`locret.heads.HeadsConfig`) and a model card. The released format is a torch file
with `model.layers.{i}.self_attn.fc1.weight` and `fc2.weight`, alone or in a whole-model dict.

Loading never executes code. Saving writes aside and renames: a failed save changes nothing.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from locret.card import model_card

WEIGHTS = "heads.safetensors"
RECORD = "config.json"
CARD = "README.md"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OURS = re.compile(r"layers\.(\d+)\.(fc[12])\.weight")
_RELEASED = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.(fc[12])\.weight")


def load(
    source: str | Path, *, revision: str | None = None, token: str | None = None
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Read an artifact folder, a released `.bin`, or a Hub repository with either.

    Returns:
        The record (None for the released format, which has none) and the tensors under our names.

    Raises:
        ValueError: nothing usable there; says what was looked for.
    """
    path = Path(source)
    if not path.exists():
        path = _download(str(source), revision, token)
    if path.is_file():
        return None, _load_released(path)
    if (path / WEIGHTS).is_file():
        return _load_record(path / RECORD), _load_weights(path / WEIGHTS)
    released = sorted(path.glob("*.bin"))
    if len(released) == 1:
        return None, _load_released(released[0])
    raise ValueError(
        f"{source}: neither {WEIGHTS} nor a single .bin file in this folder; "
        f"found {sorted(p.name for p in path.iterdir())}"
    )


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Compare names, shapes and values with what heads need.

    Raises:
        ValueError: names every tensor missing, extra, misshapen or not finite.
    """
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
    """Write the artifact folder. Other files in it are left alone; a failure changes nothing."""
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected a folder to write the heads to")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    with written_aside(folder) as aside:
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / RECORD).write_text(text, encoding="utf-8")
        (aside / CARD).write_text(model_card(record), encoding="utf-8")
        # safetensors writes files that only their owner may read
        (aside / WEIGHTS).chmod((aside / RECORD).stat().st_mode)
    return folder


def save_released(path: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write the released format: a torch dict of `model.layers.{i}.self_attn.fc{1,2}.weight`."""
    path = Path(path)
    named = {}
    for name, tensor in tensors.items():
        match = _OURS.fullmatch(name)
        assert match, name
        key = f"model.layers.{match[1]}.self_attn.{match[2]}.weight"
        named[key] = tensor.detach().cpu().contiguous()
    with written_aside(path.parent) as aside:
        torch.save(named, aside / path.name)
    return path


def push(
    repo_id: str, save: Callable[[Path], Any], *, private: bool = False, token: str | None = None
) -> str:
    """Save an artifact aside with `save(folder)`, upload it in one commit, return its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload heads")
    return str(url)


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
    """Move all files of `aside` into `folder`, or, if one fails, put back what was there."""
    files = sorted(aside.iterdir())
    before = aside / "before"
    before.mkdir()
    with contextlib.ExitStack() as undo:
        for file in files:
            target = folder / file.name
            if target.exists():
                shutil.copy2(target, before / file.name)
                put_back = functools.partial(os.replace, before / file.name, target)
            else:
                put_back = functools.partial(target.unlink, missing_ok=True)
            os.replace(file, target)
            undo.callback(put_back)
        undo.pop_all()


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, token=token, allow_patterns=[WEIGHTS, RECORD, "*.bin"]
            )
        )
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is neither an existing path nor a Hub repository id: {error}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{repo_id!r} is no path here, and the Hub did not give it: {error}"
        ) from error


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


def _load_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or corrupted: {error}") from error


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
