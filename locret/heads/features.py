"""What a retaining head reads of a token: the choices, by the name that configs and artifacts use.

qkv     [Q, K, V] of all heads before RoPE, in this order (the paper's; released heads need it).
hidden  the attention layer's input, after its norm; smaller, and known before the projections.

To add one, write the function and give it a name in `FEATURES`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class LayerTensors(Protocol):
    """What a layer has at hand: query [B, H*G, T, D], key and value [B, H, T, D], all before RoPE,
    and hidden [B, T, hidden size]."""

    @property
    def query(self) -> Tensor: ...
    @property
    def key(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def hidden(self) -> Tensor: ...


def qkv(layer: LayerTensors) -> Tensor:
    """[B, T, (H*G + 2H) * D]."""
    flat = [x.transpose(1, 2).flatten(2) for x in (layer.query, layer.key, layer.value)]
    return torch.cat(flat, dim=-1)


def hidden(layer: LayerTensors) -> Tensor:
    """[B, T, hidden size]."""
    return layer.hidden


FEATURES: dict[str, Callable[[LayerTensors], Tensor]] = {"qkv": qkv, "hidden": hidden}
