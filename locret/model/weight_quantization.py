"""Backbones whose weights are stored in 8 or 4 bits: the choices, by the name that configs use.

int8  one scale a row, 8 bits (torchao, weight only). On the CPU and on GPUs.
nf4   blocks of 64 weights, 4 bits of normal-float (bitsandbytes, QLoRA, arXiv 2305.14314).

Embeddings, norms and the output layer stay as they are, and so do the retaining heads.
"""

import importlib.util
from typing import Any, Literal

import torch

Quantization = Literal["int8", "nf4"]
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
"""What each needs, beside accelerate."""


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
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )
