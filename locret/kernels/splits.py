"""Attention over the units of a KV head in splits, each by a program of its own, and their merge:
split-KV flash decoding.

A split leaves its average value and log2 of its sum of weights; splits merge by these in any order.
All logits are in units of log2, so that exp2 serves. `merge_attention` merges two whole attentions
by natural log-sum-exps in the same way.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from locret.kernels.dispatch import on_device, padded, takes_triton, tl, triton, units_at

_LEAST_SPLIT = 128  # units of the capacity that are worth a program of their own
_SLICE = 32  # channels that a program merges
_STEP = 128  # splits that it reads at a time
_TOKENS = 32  # tokens of one head of which a program merges two attentions


@dataclass(frozen=True)
class Splits:
    """What the programs of one attention leave for the merge.

    Attributes:
        values: float32 [B, H, N, R, D], the average value of each of N splits and R
            queries.
        weights: float32 [B, H, N, R], log2 of the sum of weights; -inf where there were no units.
    """

    values: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, like: Tensor, heads: int, count: int) -> "Splits":
        """For queries `like` [B, H*G, T, D] on `heads` KV heads, in `count` splits."""
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
        """Write the attention of all splits together to `out` [B, H*G, T, D]; zeros of no units."""
        batch, heads, count, queries = self.weights.shape
        size = out.shape[3]
        slice_size = min(_SLICE, padded(size))
        with on_device(out):
            _merge_splits[(queries * -(-size // slice_size), heads, batch)](
                *(self.values, self.weights, out, out.stride()),
                NEW=out.shape[2],
                QUERIES=queries,
                SIZE=size,
                SLICE=slice_size,
                SPLITS=count,
                SPLIT_BLOCK=padded(count),
                STEP=min(_STEP, padded(count)),
                num_warps=4,
            )


@functools.cache
def number_of_splits(heads: int, capacity: int, at_once: int, start: int = 0) -> int:
    """Programs that share the units of a KV head, for `heads` KV heads in all.

    The fewest of those that finish soonest, if programs run in rounds of `at_once` and each takes
    the time of `start` units to begin and end.
    """
    most = max(1, min(-(-capacity // _LEAST_SPLIT), -(-4 * at_once // heads)))
    return min(
        range(1, most + 1),
        key=lambda splits: -(-heads * splits // at_once) * (capacity + start * splits) / splits,
    )


@triton.jit
def first_slot(first, b, h, before):  # type: ignore[no-untyped-def]
    """The first slot that a head attends to, counted from slot `before` on; `first` None = 0."""
    slot = tl.full((), 0, tl.int32)
    if first is not None:
        slot = tl.maximum(tl.load(first + b * tl.num_programs(1) + h) - before, 0)
    return slot


@triton.jit
def split_of(begin, end, MULTIPLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's equal share of the units begin .. end - 1, whole multiples of MULTIPLE: the
    first of them, and the first after them."""
    each = tl.cdiv(tl.maximum(end - begin, 0), tl.num_programs(0))
    each = tl.cdiv(each, MULTIPLE) * MULTIPLE
    begin = tl.minimum(begin + tl.program_id(0) * each, end)
    return begin, tl.minimum(begin + each, end)


@triton.jit
def queries_at(  # type: ignore[no-untyped-def]
    query, strides, b, h, which, NEW: tl.constexpr, QUERIES: tl.constexpr
):
    """Where queries `which` of a KV head begin, [R, 1]: NEW tokens of each query head."""
    head = h * (QUERIES // NEW) + which // NEW
    return query + b * strides[0] + (head * strides[1] + (which % NEW) * strides[2])[:, None]


@triton.jit
def states_at(b, h, at_split, splits, which, QUERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where this program leaves what its split gives; its kernel's splits begin at `at_split`."""
    split = at_split + tl.program_id(0)
    return ((b * tl.num_programs(1) + h) * splits + split) * QUERIES + which


@triton.jit
def weigh(logits, highest, total):  # type: ignore[no-untyped-def]
    """Online softmax: the weights of units with these logits, by how much what was summed before
    shrinks, and the new state."""
    higher = tl.maximum(highest, tl.max(logits, 1))
    # A query that has seen nothing yet has no highest logit to subtract.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(highest - base)
    return weights, shrink, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def log_sum(highest, total):  # type: ignore[no-untyped-def]
    """log2 of a split's sum of weights; -inf where it saw no unit."""
    some = total > 0.0
    return tl.where(some, highest + tl.log2(tl.where(some, total, 1.0)), float("-inf"))


@triton.jit
def average(summed, total):  # type: ignore[no-untyped-def]
    """A split's average value; zero where it saw no unit."""
    return summed / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def _merge_splits(  # type: ignore[no-untyped-def]
    values,
    weights,
    out,
    strides,
    NEW: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    SLICE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    which = tl.program_id(0) % QUERIES
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    split = tl.arange(0, SPLIT_BLOCK)
    d = tl.program_id(0) // QUERIES * SLICE + tl.arange(0, SLICE)
    before = (b * tl.num_programs(1) + h) * SPLITS
    there = split < SPLITS
    sums = tl.load(weights + (before + split) * QUERIES + which, mask=there, other=float("-inf"))
    highest = tl.max(sums, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(sums - highest), 0)

    summed = tl.zeros((STEP, SLICE), tl.float32)
    for start in tl.static_range(0, SPLITS, STEP):
        split = start + tl.arange(0, STEP)
        at = (before + split) * QUERIES + which
        share = tl.load(weights + at, mask=split < SPLITS, other=float("-inf"))
        share = tl.exp2(share - highest)
        mask = (split < SPLITS)[:, None] & (d < SIZE)[None, :]
        averages = tl.load(values + at[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
        summed += share[:, None] * averages
    merged = tl.sum(summed, 0) / tl.where(total > 0.0, total, 1.0)
    q_head = h * (QUERIES // NEW) + which // NEW
    out += b * strides[0] + q_head * strides[1] + (which % NEW) * strides[2] + d * strides[3]
    tl.store(out, merged.to(out.dtype.element_ty), mask=d < SIZE)


def merge_attention(
    first: Tensor, first_logsumexp: Tensor, second: Tensor, second_logsumexp: Tensor
) -> Tensor:
    """Attention over two sets of keys together, of the attentions over each.

    Args:
        first, second: outputs over either set, [B, N, T, D], N query heads, of any strides.
        first_logsumexp, second_logsumexp: [B, N, T] float32, natural logarithms.

    Returns:
        [B, T, N, D], contiguous, in the outputs' dtype.
    """
    given = (first, first_logsumexp, second, second_logsumexp)
    if not takes_triton(*given):
        return merge_attention_reference(*given)
    batch, heads, tokens, size = first.shape
    first, second = (x if x.stride(-1) == 1 else x.contiguous() for x in (first, second))
    merged = torch.empty(batch, tokens, heads, size, dtype=first.dtype, device=first.device)
    with on_device(first):
        _merge_two[(triton.cdiv(tokens, _TOKENS), heads, batch)](
            *((first, second), (first_logsumexp, second_logsumexp), merged, tokens, heads),
            (first.stride()[:3], second.stride()[:3]),
            (first_logsumexp.stride(), second_logsumexp.stride()),
            SIZE=size,
            PADDED=padded(size),
            BLOCK=_TOKENS,
        )
    return merged


def merge_attention_reference(
    first: Tensor, first_logsumexp: Tensor, second: Tensor, second_logsumexp: Tensor
) -> Tensor:
    """The twin of `merge_attention`, in plain PyTorch."""
    share = torch.sigmoid(first_logsumexp - second_logsumexp)[..., None]
    merged = first.float() * share + second.float() * (1 - share)
    return merged.to(first.dtype).transpose(1, 2).contiguous()


@triton.jit
def _merge_two(  # type: ignore[no-untyped-def]
    attentions,
    logsumexps,
    merged,
    tokens,
    heads,
    strides,
    logsumexp_strides,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    inside = t < tokens
    both = inside[:, None] & (d < SIZE)[None, :]
    t64 = t.to(tl.int64)
    at_first = units_at(logsumexps[0], logsumexp_strides[0], b, head, t64)
    at_second = units_at(logsumexps[1], logsumexp_strides[1], b, head, t64)
    difference = tl.load(at_first, mask=inside, other=0.0)
    difference -= tl.load(at_second, mask=inside, other=0.0)
    share = tl.sigmoid(difference)[:, None]
    at_first = units_at(attentions[0], strides[0], b, head, t64)[:, None] + d[None, :]
    at_second = units_at(attentions[1], strides[1], b, head, t64)[:, None] + d[None, :]
    x = tl.load(at_first, mask=both, other=0.0).to(tl.float32)
    y = tl.load(at_second, mask=both, other=0.0).to(tl.float32)
    result = x * share + y * (1 - share)
    to = merged + ((b * tokens + t64[:, None]) * heads + head) * SIZE + d[None, :]
    tl.store(to, result.to(merged.dtype.element_ty), mask=both)
