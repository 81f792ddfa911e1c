"""The naive twin of the paper's algorithm: units in Python lists, one head and one query at a time.

Uses the model's own submodules (projections, norms, MLPs) and nothing of locret but head weights.
Layers with a sliding window hold what the next token sees of it, and have no heads.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import silu


@dataclass
class Unit:
    position: int
    score: float
    key: torch.Tensor  # [D], before RoPE
    value: torch.Tensor  # [D]


@dataclass
class Settings:
    budget: int | None
    chunk_size: int
    stabilizers: int
    local_tokens: int
    decode_interval: int | None = None


@torch.no_grad()
def run(model, heads, input_ids, settings):
    """Kept source positions [layer][KV head] after the prompt's last eviction, and last logits."""
    layers = model.model.layers
    cache = [[[] for _ in range(model.config.num_key_value_heads)] for _ in layers]
    tokens = input_ids[0].tolist()
    split = max(len(tokens) - settings.local_tokens, 0)
    for start in range(0, split, settings.chunk_size):
        end = min(start + settings.chunk_size, split)
        protected = 0 if end == split else settings.stabilizers
        read(model, heads, tokens[start:end], start, cache, settings.budget, protected)
    kept = [[[unit.position for unit in units] for units in layer] for layer in cache]
    logits = read(model, heads, tokens[split:], split, cache, None, 0)
    return kept, logits


@torch.no_grad()
def answer(model, heads, input_ids, settings, new_tokens):
    """Greedy answer of a prompt, evicting while answering if the settings say so."""
    layers = model.model.layers
    cache = [[[] for _ in range(model.config.num_key_value_heads)] for _ in layers]
    tokens = input_ids[0].tolist()
    split = max(len(tokens) - settings.local_tokens, 0)
    for start in range(0, split, settings.chunk_size):
        end = min(start + settings.chunk_size, split)
        protected = 0 if end == split else settings.stabilizers
        read(model, heads, tokens[start:end], start, cache, settings.budget, protected)
    bound = (None, 0, 0)
    if settings.decode_interval is not None:
        bound = (settings.budget, settings.stabilizers, settings.decode_interval - 1)
    logits = read(model, heads, tokens[split:], split, cache, *bound)
    for _ in range(new_tokens - 1):
        tokens.append(int(logits.argmax()))
        logits = read(model, heads, tokens[-1:], len(tokens) - 1, cache, *bound)
    return [*tokens, int(logits.argmax())], max(len(u) for layer in cache for u in layer)


def read(model, heads, tokens, start, cache, budget, protected, slack=0):
    hidden = model.model.embed_tokens(torch.tensor([tokens]))
    scored = iter(heads.layers)
    for layer_idx, layer in enumerate(model.model.layers):
        residual, window = hidden, getattr(layer.self_attn, "sliding_window", None)
        query, key, value = project(model, layer.self_attn, layer.input_layernorm(hidden))
        scores = score(next(scored), query, key, value) if window is None else None
        for head, units in enumerate(cache[layer_idx]):
            for t in range(len(tokens)):
                given = scores[head][t] if scores else 0.0
                units.append(Unit(start + t, given, key[t, head], value[t, head]))
        seen = look(model, layer, query, cache[layer_idx], window)
        hidden = residual + layer.self_attn.o_proj(seen)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if window is not None:
            cache[layer_idx] = [units[-(window - 1) :] for units in cache[layer_idx]]
        elif budget is not None:
            cache[layer_idx] = [
                evict(units, budget, protected) if len(units) > budget + slack else units
                for units in cache[layer_idx]
            ]
    return model.lm_head(model.model.norm(hidden))[0, -1]


def project(model, attention, hidden):
    """query [T, H*G, D], key and value [T, H, D] of one row, before RoPE."""
    config, size = model.config, attention.head_dim
    if hasattr(attention, "qkv_proj"):
        widths = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
        parts = attention.qkv_proj(hidden)[0].split([width * size for width in widths], dim=-1)
    else:
        parts = [getattr(attention, f"{name}_proj")(hidden)[0] for name in "qkv"]
    query, key, value = (part.unflatten(-1, (-1, size)) for part in parts)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query, key, value


def score(head, query, key, value):
    """[H][T] floats."""
    rows = []
    for q, k, v in zip(query, key, value, strict=True):
        features = torch.cat([q.flatten(), k.flatten(), v.flatten()])
        rows.append(head.fc2.weight @ silu(head.fc1.weight @ features))
    return torch.stack(rows, dim=1).tolist()


def look(model, layer, query, layer_units, window=None):
    """Attention output [1, T, H*G*D]: every query over the units up to its own, in a window."""
    new, query_heads, _ = query.shape
    group = query_heads // len(layer_units)
    rows = []
    for t in range(new):
        outputs = []
        for query_head in range(query_heads):
            units = layer_units[query_head // group]
            slot = len(units) - new + t
            first = 0 if window is None else max(slot - window + 1, 0)
            turned = rotate(model, query[t, query_head], slot)
            logits = torch.stack(
                [turned @ rotate(model, units[j].key, j) for j in range(first, slot + 1)]
            )
            weights = (logits * layer.self_attn.scaling).softmax(dim=0)
            outputs.append(weights @ torch.stack([unit.value for unit in units[first : slot + 1]]))
        rows.append(torch.cat(outputs))
    return torch.stack(rows)[None]


def rotate(model, x, slot):
    """RoPE in the two-halves layout at one slot; LongRoPE with its long factors."""
    rope = model.config.rope_parameters
    if rope["rope_type"] == "longrope":
        size = x.shape[0]
        exponents = torch.arange(0, size, 2) / size
        frequencies = 1 / (torch.tensor(rope["long_factor"]) * rope["rope_theta"] ** exponents)
    else:
        frequencies = model.model.rotary_emb.inv_freq
    angles = slot * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin])
    return turned * model.model.rotary_emb.attention_scaling


def evict(units, budget, protected):
    """The `budget` units to keep, in order: the last `protected`, then the highest scores."""
    if len(units) <= budget:
        return units
    free, tail = units[: len(units) - protected], units[len(units) - protected :]
    best = sorted(free, key=lambda unit: unit.score, reverse=True)[: budget - protected]
    return sorted(best, key=lambda unit: unit.position) + tail
