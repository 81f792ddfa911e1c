"""What a cache holds, in a form that tests compare: units are [B][H] lists of tensors, because
sequences need not be equally long."""

from typing import Any

import torch
from torch import Tensor


def stacked(units: list[list[Tensor]]) -> Tensor:
    """Units of sequences that are equally long, [B, H, S]."""
    return torch.stack([torch.stack(row) for row in units])


def kept(cache: Any, layer_idx: int = 0, head: int = 0, row: int = 0) -> list[int]:
    """Source positions of one sequence."""
    positions: list[int] = cache.layers[layer_idx].source_positions[row][head].tolist()
    return positions


def kept_of(cache: Any) -> list[list[list[list[int]]]]:
    """Source positions by layer, row and head."""
    return [
        [[units.tolist() for units in row] for row in layer.source_positions]
        for layer in cache.layers
    ]
