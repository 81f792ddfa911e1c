"""How many tokens of a prompt are read at a time where nobody says, and what a token takes.

Every chunk reads all units that were kept before it, and every launch costs a GPU's host some time:
few tokens are slow there. On one H100 (8B shapes, 128K tokens) 4,096 and 8,192 are about as fast,
and twice as fast as 1,024; over 65,536 units in 3 bits, which are expanded once a chunk, 8,192 are
faster by a twentieth. A CPU gains nothing beyond 512, since a chunk attends to itself as well:
SmolLM2-135M on one core, 4,096 tokens at a budget of 512, takes 5.9, 6.3, 6.5, 7.5 and 9.8 s in
chunks of 256, 512, 1,024, 2,048 and 4,096. The choice follows from the kind of device, the model's
sizes and the budget, never from a timing: the same settings read alike again.
"""

from typing import Any

import torch

from locret.heads.heads import Geometry
from locret.model.backbone import Backbone

ON_CPU, ON_GPU, ON_GPU_PACKED = 512, 4096, 8192
"""The fastest sizes (of several that are about as fast, the smallest on a GPU, since memory is
dearer there, and the largest on a CPU). Where units are packed, a GPU expands a layer's context and
packs what stays of it once a chunk, which more tokens pay for."""

SMALLEST = 256
"""Sizes below are slow everywhere."""

SHARE = 4
"""A chunk takes at most this part of the memory that weights leave."""


def chosen_chunk(kind: str, packs: bool, room: int | None, memory: float, token_bytes: int) -> int:
    """Tokens to read at a time: the fastest size, halved until it fits, but not below `SMALLEST`.

    Args:
        kind: of the device, "cpu", "cuda" and so on.
        packs: units that are kept are stored in few bits.
        room: slots of the model's window beside what is kept; None = any number.
        memory: bytes of the device that weights leave.
        token_bytes: `chunk_bytes` of one token.
    """
    on_gpu = ON_GPU_PACKED if packs else ON_GPU
    size = ON_CPU if kind == "cpu" else on_gpu
    most = memory / SHARE / token_bytes
    while size > SMALLEST and size > (most if room is None else min(room, most)):
        size //= 2
    return size


def memory_beside_weights(backbone: Backbone) -> float:
    """Bytes that the weights leave of the GPUs that hold the model; infinite on a CPU."""
    if any(device.type != "cuda" for device in backbone.devices):
        return torch.inf
    memory = sum(torch.cuda.get_device_properties(d).total_memory for d in backbone.devices)
    return memory - sum(parameter.nbytes for parameter in backbone.model.parameters())


def chunk_bytes(geometry: Geometry, config: Any, dtype: torch.dtype, head_width: int) -> int:
    """Bytes that a token of a chunk takes beside the cache: the larger of what attention and MLP
    hold of it, and its slot in the layer at work.

    Args:
        config: of the transformers model.
        head_width: hidden width of the retaining heads; 0 = none.
    """
    queries = geometry.num_query_heads * geometry.head_size
    # queries before and after rotation, the output, the heads' features and hidden layer twice
    features = geometry.feature_width("qkv") if head_width else 0
    keys_and_values = 2 * geometry.num_kv_heads * geometry.head_size
    attention = keys_and_values + 3 * queries + features + 2 * head_width
    mlp = 3 * _mlp_width(config)  # gate, up and their product
    residuals = 2 * geometry.hidden_size  # the residual stream and its normed copy
    return (residuals + max(attention, mlp)) * dtype.itemsize + working_slot(geometry, dtype)


def working_slot(geometry: Geometry, dtype: torch.dtype) -> int:
    """Bytes a slot takes in the layer at work: grown storage, rotated keys, what is gathered."""
    return 2 * geometry.num_kv_heads * geometry.head_size * dtype.itemsize * 5 // 2


def _mlp_width(config: Any) -> int:
    """Width of the MLP that a token goes through: of all its experts together."""
    experts = getattr(config, "num_experts_per_tok", None) or 1
    expert = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return max(config.intermediate_size, experts * expert)
