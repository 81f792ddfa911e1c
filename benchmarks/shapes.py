"""Backbones of well-known shapes with random weights; speed does not depend on the values."""

import argparse
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from locret.model.weights import PACKAGES, check_weights, dtype_for, torchao_config

STORED = tuple(name for name, package in PACKAGES.items() if package == "torchao")
"""How weights of a model that is made here may be stored, beside in the dtype of the run."""

PHI3_FACTORS = 48  # frequencies of a head of 96

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
    "phi-3-mini": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            # Ramps in the place of the released factors, which are as many and of this size.
            "short_factor": [1 + 2 * i / PHI3_FACTORS for i in range(PHI3_FACTORS)],
            "long_factor": [1 + 63 * i / PHI3_FACTORS for i in range(PHI3_FACTORS)],
            "original_max_position_embeddings": 4096,
        },
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0},
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
    },
}


def random_model(
    shape: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    weights: str | None = None,
    **overrides: Any,
) -> Any:
    """A model of this shape with random weights, made on the device, in eval mode.

    No token ends it. Weights may be stored as `STORED` says, those of the decoder's matrices: the
    output layer stays as it is, as with `load_model`. `overrides` are of its config.

    Raises:
        ValueError: an unknown shape; lists those there are. Or weights that cannot be had here.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is unknown; expected one of {sorted(SHAPES)}")
    if weights is not None:  # before minutes are spent on a large model
        check_weights(weights, device)
        dtype_for(weights, dtype)
    given = SHAPES[shape] | overrides
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.eval().requires_grad_(False)
    if weights is not None:
        from torchao.quantization import quantize_  # an optional package

        quantize_(model.get_decoder(), torchao_config(weights))
    return model


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The argument `--weights`, of benchmarks that show floors."""
    parser.add_argument(
        "--weights",
        choices=STORED,
        help="store the decoder's matrices so, fp8 with products in FP8; default: in --dtype. The "
        "floors stay those of weights and products in --dtype",
    )


def device_and_dtype(device: str, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """The device of that name, a GPU with its number, and the dtype: on a GPU bfloat16 and
    elsewhere float32, where none is named."""
    where = torch.device(device)
    if where.type == "cuda":
        where = torch.device("cuda", where.index or 0)
    return where, getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
