"""GGUF files as backbones: which file a name means, and its weights as an ordinary model.

transformers reads these files, and keeps the weights packed where it has kernels for that. Here
they are always unpacked: heads are trained on plain weights, adapters are merged into them, and
`.to(dtype)` must work.
"""

import contextlib
import functools
import hashlib
import importlib.util
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

SUFFIX = ".gguf"
PACKAGES = ("accelerate", "gguf")
"""What transformers needs to read these files."""

_CHECKPOINT = ("*.safetensors", "pytorch_model*.bin")
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
_UNREADABLE = (ValueError, KeyError, IndexError, struct.error)
"""What the readers raise for files that were cut or hold something else."""
_one_at_a_time = threading.RLock()
"""Of loads in several threads: each puts back what it found in the package `gguf`."""


def find_gguf(name: str) -> Path | None:
    """The file that a path means: itself, or the only one in a folder without another checkpoint.

    Returns:
        None if it means no such file.

    Raises:
        ValueError: there is no such file, several are in the folder, it is one part of several, or
            packages are missing.
    """
    path = Path(name)
    if path.is_dir():
        found = _only_file(path)
        if found is None:
            return None
        path = found
    elif path.suffix.lower() != SUFFIX:
        return None
    elif not path.is_file():
        raise ValueError(f"model {name!r} is not there; expected a {SUFFIX} file")
    _check_whole(path)
    missing = missing_packages()
    if missing:
        raise ValueError(f"{path} needs packages that are missing: pip install {' '.join(missing)}")
    return path


def missing_packages() -> list[str]:
    """Packages that reading a GGUF file needs and that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _only_file(folder: Path) -> Path | None:
    """The folder's GGUF file; None if there is none, or an ordinary checkpoint is beside it."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX)
    if not files or any(next(folder.glob(pattern), None) for pattern in _CHECKPOINT):
        return None
    if len(files) > 1 and not _PART.search(files[0].name):
        names = ", ".join(path.name for path in files)
        raise ValueError(f"model {str(folder)!r} holds several {SUFFIX} files, {names}; name one")
    return files[0]


def _check_whole(file: Path) -> None:
    part = _PART.search(file.name)
    if part is not None and int(part[1]) > 1:
        raise ValueError(
            f"{file} is one part of {int(part[1])}, and only whole files are read; put them "
            "together with llama.cpp's `llama-gguf-split --merge`"
        )


def fingerprint(file: Path) -> str:
    """`sha256:` and the hash of a file's content."""
    found = file.stat()
    return f"sha256:{_sha256(file, found.st_size, found.st_mtime_ns)}"


@functools.lru_cache(maxsize=8)  # files are large, and several parts of a command ask
def _sha256(file: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def load_config(file: Path) -> Any:
    """The config that the file's metadata describe (errors: `load_model`)."""
    with _reading(file):
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def load_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the file (errors: `load_model`)."""
    with _reading(file):
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def load_model(file: Path, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """An ordinary model with the file's weights.

    Args:
        file: the GGUF file.
        dtype: of the weights; they are dequantized in float32.
        **kwargs: of `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model, and transformers' report of the loading.

    Raises:
        ValueError: not such a file, or an architecture that transformers does not read from them.
    """
    # Versions without this class always dequantize, and leave no mark of it on the model.
    settings = getattr(transformers, "GgufConfig", None)
    if settings is not None:
        kwargs["quantization_config"] = settings(dequantize=True)
    with _reading(file), _switchable_bar():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True, **kwargs
        )
    return loaded


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """While it is entered, transformers parses a file once instead of for its config, its tokenizer
    and its weights, and makes the map of tensors' names once instead of for every module. Other
    threads wait until it is left."""
    import gguf  # an optional package

    with _one_at_a_time:
        stock = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        for name, function in stock.items():
            setattr(gguf, name, functools.cache(function))
        try:
            yield
        finally:
            for name, function in stock.items():
                setattr(gguf, name, function)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        with parsed_once():
            yield
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} could not be read as a GGUF checkpoint: {reason}") from error


@contextlib.contextmanager
def _switchable_bar() -> Iterator[None]:
    """The bar of the tensors obeys `transformers.utils.logging.disable_progress_bar`, as others do:
    that module has tqdm from elsewhere."""
    theirs = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = theirs
