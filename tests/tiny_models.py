"""Tiny random models of every supported architecture: two layers, float32, ready to compare.

`FAMILIES` are those with heads to train; `SLIDING` are releases all of whose layers attend within a
sliding window, so that no policy has anything to evict.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from locret.heads.heads import HeadsConfig, RetainingHeads
from locret.model.backbone import SUPPORTED

VOCAB = 128
WINDOW = 16
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
HYBRID = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

VARIANTS = {
    "llama3.2": "llama",
    "minicpm-llama": "llama",
    "exaone4-global": "exaone4",
    "phi4-mini": "phi3",
    "qwen2.5": "qwen2",
    "qwen2-hybrid": "qwen2",
    "stablelm-norms": "stablelm",
    "mistral-sliding": "mistral",
    "phi3-sliding": "phi3",
    "qwen2-sliding": "qwen2",
}
"""Releases of supported architectures that differ in what matters here: their `model_type`."""

SLIDING = ["mistral-sliding", "phi3-sliding", "qwen2-sliding"]
FAMILIES = [name for name in (*SUPPORTED, *VARIANTS) if name not in SLIDING]
MIXED = {"exaone4", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "qwen2-hybrid"}
"""Families with layers of two kinds: the first slides, the second is retained."""
EAGER_ONLY = {"gemma2", "gpt_oss"}  # stock transformers computes them no other way

BY_FAMILY: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": True},
    "exaone4": HYBRID,
    "exaone4-global": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "gemma2": HYBRID
    | {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": HYBRID
    | {
        "query_pre_attn_scalar": 20,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": PLAIN_ROPE,
        },
    },
    "gpt_oss": HYBRID | {"rope_parameters": YARN, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "llama3.2": {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True},
    "minicpm-llama": {"rope_parameters": PLAIN_ROPE, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": PHI3_WINDOW,
        "max_position_embeddings": 400,
    },
    "phi3-sliding": {"sliding_window": WINDOW},
    "phi4-mini": {
        "rope_parameters": LONGROPE
        | {
            "partial_rotary_factor": 0.75,
            "short_factor": LONGROPE["short_factor"][:3],
            "long_factor": LONGROPE["long_factor"][:3],
        },
        "original_max_position_embeddings": PHI3_WINDOW,
        "max_position_embeddings": 400,
        "tie_word_embeddings": True,
    },
    "olmo3": HYBRID
    | {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN_ROPE}},
    "qwen2.5": {"rope_parameters": PLAIN_ROPE | {"rope_theta": 1000000.0}},
    "qwen2-hybrid": HYBRID | {"use_sliding_window": True},
    "qwen2-sliding": HYBRID
    | {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "smollm3": {"no_rope_layers": [1, 0]},  # one layer with RoPE, one without
    "stablelm": {"rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.5}},
    "stablelm-norms": {
        "rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.25},
        "qk_layernorm": True,
        "use_parallel_residual": True,
        "use_qkv_bias": True,
    },
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
    settings |= BY_FAMILY.get(family, {}) | overrides
    return AutoConfig.for_model(VARIANTS.get(family, family), **settings)


def tiny_model(
    family: str, seed: int = 0, attn_implementation: str = "sdpa", **overrides: Any
) -> Any:
    """A random model in eval mode that no token ends; `overrides` are of its config."""
    config = tiny_config(family, **overrides)
    if family in EAGER_ONLY:
        attn_implementation = "eager"
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
    from locret.model.backbone import Backbone

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
