"""Weights of a backbone in fewer bits, by torchao and bitsandbytes.

int8  one scale a row, weight only (torchao): on the CPU and on GPUs
nf4   blocks of 64 weights in 4 bits of normal-float (bitsandbytes, QLoRA, arXiv 2305.14314)
fp8   e4m3, one scale a row (torchao). A product rounds its input to e4m3 too, with a scale a token,
      and is computed in FP8: on GPUs that multiply such numbers, in bfloat16 models

Embeddings, norms and the output layer stay as they are, and so do the retaining heads.
"""

import importlib.util
from typing import Any, Literal

import torch

Quantization = Literal["int8", "nf4", "fp8"]
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes", "fp8": "torchao"}
"""What each needs, beside accelerate."""

FP8_CAPABILITY = 8, 9
"""The least compute capability of GPUs with matrix products in FP8: Ada's, and then Hopper's."""

_LEAST_ROW = 1e-12
"""The least absolute maximum of a row of activations: that of a row of zeros is 0, and torchao
would divide by it."""


def check_weights(name: str, device: torch.device) -> None:
    """Refuse what cannot be had on this device.

    Args:
        name: the scheme.
        device: where the model will be.

    Raises:
        ValueError: an unknown scheme, a device that does not compute it, or its packages are not
            installed.
    """
    if name not in PACKAGES:
        raise ValueError(f"quantization {name!r} is unknown; expected one of {sorted(PACKAGES)}")
    if name == "fp8":
        _check_multiplies_fp8(device)
    needed = ("accelerate", PACKAGES[name])
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"quantization {name!r} needs packages that are missing: {', '.join(missing)}; "
            "pip install 'locret[quant]'"
        )


def dtype_for(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """What a model with such weights computes in beside their products.

    Args:
        name: the scheme.
        dtype: as asked for; None = that of the checkpoint.

    Raises:
        ValueError: the scheme does not go with it.
    """
    if name != "fp8":
        return dtype
    if dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"weights in 'fp8' are multiplied into bfloat16, but dtype is "
            f"{str(dtype).removeprefix('torch.')!r}; give bfloat16 or auto, or take 'int8'"
        )
    return torch.bfloat16


def quantization_config(name: Quantization, dtype: torch.dtype | None) -> Any:
    """What `AutoModelForCausalLM.from_pretrained` takes as `quantization_config`.

    Args:
        name: a scheme that `check_weights` lets pass.
        dtype: that the layers of nf4 compute in; None = bfloat16.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if PACKAGES[name] == "torchao":
        return TorchAoConfig(torchao_config(name))
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.bfloat16
    )


def torchao_config(name: str) -> Any:
    """What `torchao.quantization.quantize_` takes, for a scheme of torchao's."""
    from torchao import quantization as torchao

    if name == "int8":
        return torchao.Int8WeightOnlyConfig()
    assert name == "fp8", name
    return torchao.Float8DynamicActivationFloat8WeightConfig(
        granularity=torchao.PerRow(), activation_value_lb=_LEAST_ROW
    )


def mend_rows_of_zeros(model: Any) -> None:
    """Make zeros of rows of FP8 weights that were zeros: torchao has divided them by 0."""
    for weight in filter(is_fp8, model.parameters()):
        of_zeros = (weight.scale == 0).flatten()
        weight.qdata.view(torch.uint8)[of_zeros] = 0
        weight.scale[of_zeros] = 1


def in_fp8(model: Any) -> bool:
    """Whether some of a model's products are in FP8, whoever asked torchao for it."""
    return any(map(is_fp8, model.parameters()))


def in_fp8_alone(model: Any) -> bool:
    """The same, where no weight is stored in fewer bits in another way."""
    stored = [weight for weight in model.parameters() if type(weight) is not torch.nn.Parameter]
    return bool(stored) and all(map(is_fp8, stored))


def is_fp8(weight: Any) -> bool:
    """Whether products of a weight round their input, too."""
    return type(weight).__name__ == "Float8Tensor" and weight.act_quant_kwargs is not None


def rounds_rows(weight: Any) -> bool:
    """Whether products of a weight in FP8 round their input as `torchao_config` says, and not as
    somebody else asked torchao to."""
    asked = weight.act_quant_kwargs
    return (
        asked.float8_dtype == torch.float8_e4m3fn
        and type(asked.granularity).__name__ == "PerRow"
        and (asked.hp_value_lb or 0) <= _LEAST_ROW
        and asked.hp_value_ub is None
        and getattr(weight.mm_config, "use_fast_accum", False)
    )


def check_has_gradients(model: Any) -> None:
    """Refuse (ValueError) a model whose activations have no gradients: torch knows none of products
    in FP8."""
    if in_fp8(model):
        raise ValueError(
            "no gradients go through products in FP8; load the model without quantization 'fp8', "
            "or with 'int8'"
        )


def _check_multiplies_fp8(device: torch.device) -> None:
    least = ".".join(map(str, FP8_CAPABILITY))
    instead = f"weights in 'fp8' need a GPU of compute capability {least} or above; take 'int8'"
    if device.type != "cuda":
        raise ValueError(f"the model goes to {device}, but {instead}, which runs everywhere")
    found = torch.cuda.get_device_capability(device)
    if found < FP8_CAPABILITY:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{'.'.join(map(str, found))}, but {instead}, which runs everywhere"
        )
