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
        matrix_weights: weights of the decoder's matrices that a token passes, of a mixture's
            experts those that it is sent to; lm_head left out: a prefill needs it for one position
            only.
        read_bytes: bytes of all weights that a decode step of one row reads: all but the input
            embedding, unless that is the lm_head too, and the experts that its token is not sent
            to.
        attention_width: query heads x head size, over all layers without a sliding window.
        unit_bytes: key and value of one unit in all KV heads of these layers.
        windows: tokens that each layer with a sliding window attends to, by itself.
        window_width: query heads x head size of one of them.
        window_unit_bytes: key and value of one unit in all KV heads of one of them.
    """

    matrix_weights: int
    read_bytes: int
    attention_width: int
    unit_bytes: int
    windows: tuple[int, ...] = ()
    window_width: int = 0
    window_unit_bytes: int = 0

    def prefill_seconds(self, machine: Machine, length: int, pairs: int, batch: int = 1) -> float:
        """Floor of reading `batch` prompts of `length` tokens; `pairs` as by `attended_pairs`, in
        layers without a window."""
        flop = 2 * self.matrix_weights * length + 4 * self.attention_width * pairs
        windows = sum(attended_pairs(length, window - 1, 1) for window in self.windows)
        flop += 4 * self.window_width * windows
        return batch * flop / machine.flops

    def step_seconds(self, machine: Machine, units: int, batch: int = 1) -> float:
        """Floor of a decode step with `units` held in each KV head of each row, and windows full.
        The experts are counted as for one row: more rows read more of them."""
        held = units * self.unit_bytes + sum(self.windows) * self.window_unit_bytes
        return (self.read_bytes + batch * held) / machine.bandwidth


def cost_of(model: Any) -> Cost:
    """The cost of a stock causal language model."""
    decoder, config = model.get_decoder(), model.config
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in decoder.layers]
    sliding = tuple(window for window in windows if window is not None)
    retained = len(windows) - len(sliding)
    head_dim = decoder.layers[0].self_attn.head_dim
    width, units = head_dim * config.num_attention_heads, 2 * head_dim * config.num_key_value_heads
    size = next(model.parameters()).element_size()
    weights, experts = sum(p.numel() for p in model.parameters()), _expert_weights(decoder)
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    linear = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Linear))
    chosen = experts * config.num_experts_per_tok // config.num_experts if experts else 0
    return Cost(
        matrix_weights=linear + chosen,
        read_bytes=(weights - experts + chosen) * size,
        attention_width=retained * width,
        unit_bytes=retained * units * size,
        windows=sliding,
        window_width=width if sliding else 0,
        window_unit_bytes=units * size if sliding else 0,
    )


def _expert_weights(decoder: nn.Module) -> int:
    """Weights of all experts of all mixtures, which transformers stores stacked, [experts, ...]."""
    named = decoder.named_parameters()
    return sum(p.numel() for name, p in named if ".experts." in name and p.dim() == 3)


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
