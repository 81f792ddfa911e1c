"""A tiny model and its tokenizer as one GGUF file, as llama.cpp's converters write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, CONTROL = 1, 3  # kinds of tokens
END = "<|endoftext|>"  # transformers gives every Qwen2 tokenizer from such a file this token


def write_gguf(
    path: Path, model: Any, tokenizer: PreTrainedTokenizerFast, left_out: str = "nothing"
) -> Path:
    """Write a Qwen2 model in float32.

    Args:
        left_out: tensors whose name begins so are not written.
    """
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_tokenizer(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        if not _name(name).startswith(left_out):
            writer.add_tensor(_name(name), tensor.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        index, _, stem = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{index}.{NAMES[stem]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in written["added_tokens"] if token["special"]}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([END if token == tokenizer.eos_token else token for token in tokens])
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in written["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
