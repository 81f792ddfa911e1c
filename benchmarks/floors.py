"""Floors: the least time that a prefill and a decode step can take on this machine.

A prefill takes every token through the decoder's matrices once and lets it attend to the units
held; its FLOP at the matrix rate that the machine shows is the floor. A decode step reads every
weight and every unit held once; the bytes at the copy bandwidth that the machine shows are it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import record


@dataclass(frozen=True)
class Machine:
    """What was measured on this machine, in the precision of the run.

    Attributes:
        flops: FLOP/s of a large matrix product of random numbers.
        bandwidth: bytes/s of a large copy, bytes read and bytes written counted.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Cost:
    """What a model asks of a machine.

    Attributes:
        matrix_weights: weights of the decoder's linear layers, lm_head left out: a prefill needs it
            for one position only.
        read_bytes: bytes of all weights that a decode step reads: all but the input embedding,
            unless that is the lm_head too.
        attention_width: query heads x head size, over all layers.
        unit_bytes: key and value of one unit in all KV heads of all layers.
    """

    matrix_weights: int
    read_bytes: int
    attention_width: int
    unit_bytes: int

    def prefill_seconds(self, machine: Machine, length: int, pairs: int, batch: int = 1) -> float:
        """Floor of reading `batch` prompts of `length` tokens; `pairs` as by `attended_pairs`."""
        flop = 2 * self.matrix_weights * length + 4 * self.attention_width * pairs
        return batch * flop / machine.flops

    def step_seconds(self, machine: Machine, units: int, batch: int = 1) -> float:
        """Floor of a decode step with `units` held in each KV head of each row."""
        return (self.read_bytes + batch * units * self.unit_bytes) / machine.bandwidth


def cost_of(model: Any) -> Cost:
    """The cost of a stock causal language model."""
    decoder, config = model.get_decoder(), model.config
    attention = decoder.layers[0].self_attn
    heads = len(decoder.layers) * attention.head_dim
    size = next(model.parameters()).element_size()
    weights = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    return Cost(
        matrix_weights=sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Linear)),
        read_bytes=weights * size,
        attention_width=heads * config.num_attention_heads,
        unit_bytes=2 * heads * config.num_key_value_heads * size,
    )


def attended_pairs(length: int, budget: int | None = None, chunk: int | None = None) -> int:
    """Pairs of a query and a unit it attends to: read in chunks, `budget` units held after each.

    Without a budget a token attends to itself and all before it, however they are read.
    """
    if budget is None or chunk is None:
        return length * (length + 1) // 2
    pairs = 0
    for start in range(0, length, chunk):
        new = min(chunk, length - start)
        pairs += new * min(start, budget) + new * (new + 1) // 2
    return pairs


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure matrix products and copies of a size at which they run fastest."""
    large = device.type == "cuda"
    side, size = (8192, 2**31) if large else (512, 2**24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = 20 if large else 3  # in one go, so that launching them does not count

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, b)

    def copy() -> None:
        for _ in range(times):
            target.copy_(source)

    return Machine(
        flops=2 * side**3 * times / record.seconds(multiply, 5, device),
        bandwidth=2 * size * times / record.seconds(copy, 5, device),
    )
