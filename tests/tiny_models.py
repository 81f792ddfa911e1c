"""Tiny random models of every supported architecture: two layers, float32, ready to compare."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from locret.backbone import SUPPORTED
from locret.heads import HeadsConfig, RetainingHeads

FAMILIES = list(SUPPORTED)
VOCAB = 128
HEAD_SIZE = 8
PHI3_WINDOW = 100

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.15],
    "long_factor": [1.0, 1.9, 2.8, 3.7],
    "original_max_position_embeddings": PHI3_WINDOW,
}
BY_FAMILY: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": True},
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": PHI3_WINDOW,
        "max_position_embeddings": 400,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "smollm3": {"no_rope_layers": [1, 0]},  # one layer with RoPE, one without
}


def tiny_config(family: str, **overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(family, **settings | BY_FAMILY.get(family, {}) | overrides)


def tiny_model(
    family: str, seed: int = 0, attn_implementation: str = "sdpa", **overrides: Any
) -> Any:
    """A random model in eval mode that no token ends; `overrides` are of its config."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def tiny_heads(model: Any, seed: int = 0, width: int = 16, **record: Any) -> RetainingHeads:
    """Random heads that fit the model."""
    from locret.backbone import Backbone

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = HeadsConfig.for_geometry(Backbone(model).geometry, width, **record)
        return RetainingHeads(config).requires_grad_(False)


def prompt(length: int, batch: int = 1, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Random tokens [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (batch, length), generator=generator)


def distinct_prompt(length: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Tokens [1, length] of which no two are equal, so that no two scores tie."""
    generator = torch.Generator().manual_seed(seed)
    return 3 + torch.randperm(vocab - 3, generator=generator)[None, :length]
