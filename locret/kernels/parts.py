"""Attention over the units of a KV head in parts, each by a program of its own, and their merge.

A part leaves its average value and log2 of its sum of weights; parts merge by these in any order.
All logits are in units of log2, so that exp2 serves.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from locret.kernels.dispatch import on_device, padded, tl, triton

_LEAST_PART = 128  # units of the capacity that are worth a program of their own
_START = 64
_SLICE = 32  # channels that a program merges
_STEP = 128  # parts that it reads at a time


@dataclass(frozen=True)
class Parts:
    """What the programs of one attention leave for the merge.

    Attributes:
        values: float32 [B, H, N, R, D], the average value of each of N parts and R query rows.
        weights: float32 [B, H, N, R], log2 of the sum of weights; -inf where there were no units.
    """

    values: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, like: Tensor, heads: int, count: int) -> "Parts":
        """For queries `like` [B, H*G, T, D] on `heads` KV heads, in `count` parts."""
        batch, queries, new, size = like.shape
        shape = (batch, heads, count, queries // heads * new)
        return cls(
            torch.empty(*shape, size, dtype=torch.float32, device=like.device),
            torch.empty(shape, dtype=torch.float32, device=like.device),
        )

    @property
    def count(self) -> int:
        """N."""
        return self.weights.shape[2]

    def merge(self, out: Tensor) -> None:
        """Write the attention of all parts together to `out` [B, H*G, T, D]; zeros of no units."""
        batch, heads, count, rows = self.weights.shape
        size = out.shape[3]
        slice_size = min(_SLICE, padded(size))
        with on_device(out):
            _merge[(rows * -(-size // slice_size), heads, batch)](
                *(self.values, self.weights, out),
                *out.stride(),
                NEW=out.shape[2],
                ROWS=rows,
                SIZE=size,
                SLICE=slice_size,
                PARTS=count,
                PART_BLOCK=padded(count),
                STEP=min(_STEP, padded(count)),
                num_warps=4,
            )


@functools.cache
def number_of_parts(heads: int, capacity: int, at_once: int) -> int:
    """Programs that share the units of a KV head, for `heads` KV heads in all.

    The number that finishes soonest, if programs run in rounds of `at_once` and each takes the time
    of `_START` units to begin and end.
    """
    most = max(1, min(-(-capacity // _LEAST_PART), -(-4 * at_once // heads)))
    return min(
        range(1, most + 1),
        key=lambda parts: -(-heads * parts // at_once) * (capacity / parts + _START),
    )


@triton.jit
def weigh(logits, highest, total):  # type: ignore[no-untyped-def]
    """Online softmax: the weights of units with these logits, by how much what was summed before
    shrinks, and the new state."""
    higher = tl.maximum(highest, tl.max(logits, 1))
    # A row that has seen nothing yet has no highest logit to subtract.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(highest - base)
    return weights, shrink, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def log_sum(highest, total):  # type: ignore[no-untyped-def]
    """log2 of a part's sum of weights; -inf where it saw no unit."""
    some = total > 0.0
    return tl.where(some, highest + tl.log2(tl.where(some, total, 1.0)), float("-inf"))


@triton.jit
def average(summed, total):  # type: ignore[no-untyped-def]
    """A part's average value; zero where it saw no unit."""
    return summed / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    values,
    weights,
    out,
    out_b,
    out_h,
    out_t,
    out_d,
    NEW: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    SLICE: tl.constexpr,
    PARTS: tl.constexpr,
    PART_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0) % ROWS
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    part = tl.arange(0, PART_BLOCK)
    d = tl.program_id(0) // ROWS * SLICE + tl.arange(0, SLICE)
    before = (b * tl.num_programs(1) + h) * PARTS
    sums = tl.load(weights + (before + part) * ROWS + row, mask=part < PARTS, other=float("-inf"))
    highest = tl.max(sums, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(sums - highest), 0)

    summed = tl.zeros((STEP, SLICE), tl.float32)
    for start in tl.static_range(0, PARTS, STEP):
        part = start + tl.arange(0, STEP)
        at = (before + part) * ROWS + row
        share = tl.load(weights + at, mask=part < PARTS, other=float("-inf"))
        share = tl.exp2(share - highest)
        mask = (part < PARTS)[:, None] & (d < SIZE)[None, :]
        parts = tl.load(values + at[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
        summed += share[:, None] * parts
    merged = tl.sum(summed, 0) / tl.where(total > 0.0, total, 1.0)
    q_head = h * (ROWS // NEW) + row // NEW
    out += b * out_b + q_head * out_h + (row % NEW) * out_t + d * out_d
    tl.store(out, merged.to(out.dtype.element_ty), mask=d < SIZE)
