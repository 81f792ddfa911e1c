"""Attention over the units of a sequence by several programs, and the merge of what they leave:
split-KV flash decoding.

A program leaves its average value and log2 of its sum of weights; these merge in any order. All
logits are in units of log2, so that exp2 serves. `merge_attention` merges two whole attentions by
natural log-sum-exps in the same way.
"""

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from locret.kernels.dispatch import (
    early,
    on_device,
    padded,
    start_next,
    takes_triton,
    tl,
    triton,
    units_at,
    wait_for_last,
)
from locret.kernels.rotated_levels import turned

_LEAST_SPLIT = 128  # units of the capacity that are worth a program of their own
_SLICE = 32  # channels that a program merges
_STATES = 64  # states of tiles that it reads at a time
_ROTATED_STATES = (128, 32)  # of rotated tiles, since it waits for each time, and of others
_ROUNDS = 4  # most rounds of programs that tiles are made for
_TOKENS = 32  # tokens of one head of which a program merges two attentions


@dataclass(frozen=True)
class Shares:
    """Which program attends to which units of some flat sequences.

    Attributes:
        tiles: int32 [P, 3] on the device: sequence, first unit, one past the last (flat indices).
            No tile is empty, none crosses a sequence's border. P is fixed while the context lives.
        firsts: int32 [Q + 1] on the device: the tiles of sequence s are firsts[s] ..
            firsts[s + 1] - 1; tiles stand in the order of sequences.
        lengths: units of each of the Q sequences.
    """

    tiles: Tensor
    firsts: Tensor
    lengths: tuple[int, ...]

    @property
    def count(self) -> int:
        """P."""
        return self.tiles.shape[0]

    @functools.cached_property
    def units(self) -> int:
        """N, units of all sequences."""
        return sum(self.lengths)


def share_out(
    lengths: Sequence[int],
    at_once: int,
    device: torch.device | str,
    least: int = _LEAST_SPLIT,
    start: int = 0,
) -> Shares:
    """Tiles of nearly equal size for sequences of these lengths, the size that finishes soonest.

    Args:
        lengths: units of each sequence, zero included.
        at_once: programs that run at a time.
        least: units that are worth a program of their own.
        start: how many units a program could read in the time that it takes to begin and end.

    Raises:
        ValueError: a length is negative, `at_once` or `least` is not positive.
    """
    if min(lengths, default=0) < 0 or min(at_once, least) < 1:
        raise ValueError(
            f"lengths {tuple(lengths)}, at_once {at_once} and least {least}: "
            "expected no negative length and positive others"
        )
    lengths = tuple(lengths)
    tiles, firsts = _tiles(lengths, at_once, least, start)
    # Not blocking: a copy from memory that is not pinned is staged before the call returns.
    return Shares(
        torch.tensor(tiles, dtype=torch.int32).view(-1, 3).to(device, non_blocking=True),
        torch.tensor(firsts, dtype=torch.int32).to(device, non_blocking=True),
        lengths,
    )


@functools.lru_cache(maxsize=256)
def _tiles(
    lengths: tuple[int, ...], at_once: int, least: int, start: int
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """`Shares.tiles` and `Shares.firsts`."""
    size = _tile_size(lengths, at_once, least, start)
    counts = [-(-length // size) for length in lengths]
    offsets = accumulate(lengths, initial=0)
    tiles = [
        (sequence, offset + length * i // count, offset + length * (i + 1) // count)
        for sequence, (length, count, offset) in enumerate(
            zip(lengths, counts, offsets, strict=False)
        )
        for i in range(count)
    ]
    return tiles, [*accumulate(counts, initial=0)]


def _tile_size(lengths: tuple[int, ...], at_once: int, least: int, start: int) -> int:
    """The most units of a tile: the size whose rounds of `at_once` programs finish soonest, in as
    few rounds as that takes."""
    longest = max(lengths, default=0)

    def tiles(size: int) -> int:
        return sum(-(-length // size) for length in lengths)

    def smallest(rounds: int) -> int:
        programs = rounds * at_once
        sizes = range(max(least, -(-sum(lengths) // programs)), longest)
        return sizes.start + bisect.bisect_left(sizes, True, key=lambda n: tiles(n) <= programs)

    fewest = max(1, -(-sum(length > 0 for length in lengths) // at_once))
    sizes = {rounds: smallest(rounds) for rounds in range(fewest, max(fewest, _ROUNDS) + 1)}
    return sizes[min(sizes, key=lambda rounds: rounds * (sizes[rounds] + start))]


@functools.lru_cache(maxsize=256)
def number_of_tail_splits(sequences: int, capacity: int, tile: int, at_once: int) -> int:
    """Programs that share the tail of each of so many sequences, beside tiles of `tile` units on
    average (0 = none): as many as make their shares as large when the capacity is filled, and no
    more than finish soonest by themselves."""
    alone = _tile_size((capacity,) * sequences, at_once, _LEAST_SPLIT, 0)
    return -(-capacity // max(tile, alone))


@dataclass(frozen=True)
class States:
    """What the programs of one attention over ragged sequences leave for the merge.

    First those of the context's tiles, in the order of the tiles, then `tail_splits` of every
    sequence's tail, sequence-major.

    Attributes:
        values: float32 [P + Q * tail_splits, R, D], the average value of each of R queries.
        weights: float32 [P + Q * tail_splits, R], log2 of the sum of weights; -inf of no units.
        tail_splits: states of each sequence's tail.
    """

    values: Tensor
    weights: Tensor
    tail_splits: int

    @classmethod
    def empty(cls, query: Tensor, heads: int, tiles: int, tail_splits: int) -> "States":
        """For queries [B, H*G, T, D] on `heads` KV heads and P = `tiles` tiles."""
        batch, q_heads, new, size = query.shape
        shape = (tiles + batch * heads * tail_splits, q_heads // heads * new)
        values = torch.empty(*shape, size, dtype=torch.float32, device=query.device)
        return cls(values, torch.empty_like(values[..., 0]), tail_splits)

    def merge(self, out: Tensor, shares: Sequence[Shares], rotated: bool = False) -> None:
        """Write the attention of all states together to `out` [B, H*G, T, D]; zeros of no units.

        Args:
            shares: one or two, whose tiles together are the P, in this order.
            rotated: the averages of the first shares' tiles are to be rotated back by H.
        """
        queries, size = self.values.shape[1:]
        batch, q_heads, new, _ = out.shape
        first, second = shares[0], shares[1] if len(shares) > 1 else None
        slice_size = padded(size, least=16) if rotated else min(_SLICE, padded(size))
        with on_device(out):
            _merge_states[(queries * -(-size // slice_size), q_heads * new // queries, batch)](
                *((self.values, self.weights), out, first.firsts, second and second.firsts),
                *(first.count, sum(share.count for share in shares), self.tail_splits),
                out.stride(),
                NEW=new,
                QUERIES=queries,
                SIZE=size,
                SLICE=slice_size,
                STEP=_ROTATED_STATES[0] if rotated else _STATES,
                OTHERS=_ROTATED_STATES[1],
                ROTATED=rotated,
                num_warps=16 if rotated else 4,
                **early(out),
            )


def merge_states_reference(states: States, out: Tensor, shares: Sequence[Shares]) -> None:
    sequence = torch.arange(out[..., 0].numel() // states.values.shape[1], device=out.device)
    of_tails = sequence.repeat_interleave(states.tail_splits)
    owners = torch.cat([*(share.tiles[:, 0] for share in shares), of_tails])
    others = owners != sequence[:, None]  # [Q, states]
    sums = states.weights.masked_fill(others[..., None], -torch.inf)  # [Q, states, R]
    weights = (sums * math.log(2)).softmax(1).nan_to_num(0.0)
    merged = torch.einsum("qnr,nrd->qrd", weights, states.values)
    out.copy_(merged.reshape(out.shape))


@triton.jit
def queries_at(  # type: ignore[no-untyped-def]
    query, strides, b, h, which, NEW: tl.constexpr, QUERIES: tl.constexpr
):
    """Where queries `which` of a KV head begin: NEW tokens of each query head."""
    return units_at(query, strides, b, h * (QUERIES // NEW) + which // NEW, which % NEW)


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
def tile_at(tiles, tile):  # type: ignore[no-untyped-def]
    """The sequence of a tile of `Shares`, its first unit and the first after it."""
    tiles += 3 * tile
    return tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)


@triton.jit
def leave_sum(weights, state, which, highest, total, QUERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store what a tile or a tail's share gives at its place among `States`: log2 of the sums of
    weights, -inf of no unit, of an online softmax's highest logit and sum, [R] each. Returns where
    they are, [R]."""
    at = state.to(tl.int64) * QUERIES + which
    some = total > 0.0
    log = tl.where(some, highest + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(weights + at, log, mask=which < QUERIES)
    return at


@triton.jit
def leave_average(  # type: ignore[no-untyped-def]
    values, at, which, d, there, total, summed, QUERIES: tl.constexpr, SIZE: tl.constexpr
):
    """Store the average values, zero of no unit, of the sums [R, D] of values in the channels `d`
    [D] that are `there`; `at` is what `leave_sum` gave."""
    mask = (which < QUERIES)[:, None] & there[None, :]
    average = summed / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(values + at[:, None] * SIZE + d[None, :], average, mask=mask)


@triton.jit(do_not_specialize=["second_at", "tail_at", "tail_splits"])
def _merge_states(  # type: ignore[no-untyped-def]
    states, out, firsts, second_firsts, second_at, tail_at, tail_splits, strides,
    NEW: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, SLICE: tl.constexpr,
    STEP: tl.constexpr, OTHERS: tl.constexpr, ROTATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start_next(EARLY)
    which = tl.program_id(0)
    d = tl.arange(0, SLICE)
    if not ROTATED:
        d += which // QUERIES * SLICE
        which = which % QUERIES
    sequence = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tiles = states_of(firsts, sequence, 0)
    others = states_of(second_firsts, sequence, second_at)
    tail = (tail_at + sequence * tail_splits, tail_splits)
    wait_for_last(EARLY)
    if ROTATED:
        none = (0, 0)
        highest, total, rotated = merged_states(
            states, tiles, none, none, which, d, QUERIES, SIZE, SLICE, STEP
        )
        other_highest, other_total, plain = merged_states(
            states, others, tail, none, which, d, QUERIES, SIZE, SLICE, OTHERS
        )
        base = tl.maximum(highest, other_highest)
        base = tl.where(base == float("-inf"), 0.0, base)
        shrink = tl.exp2(highest - base)
        other_shrink = tl.exp2(other_highest - base)
        total = total * shrink + other_total * other_shrink
        inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
        merged = turned(rotated * (shrink * inverse), SIZE, SLICE)
        merged += plain * (other_shrink * inverse)
    else:
        _, total, summed = merged_states(
            states, tiles, others, tail, which, d, QUERIES, SIZE, SLICE, STEP
        )
        merged = summed / tl.where(total > 0.0, total, 1.0)
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    to = queries_at(out, strides, b, h, which, NEW, QUERIES) + d * strides[3]
    tl.store(to, merged.to(out.dtype.element_ty), mask=d < SIZE)


@triton.jit
def states_of(firsts, sequence, before):  # type: ignore[no-untyped-def]
    """The first state of a sequence's tiles, and how many there are, where `before` come before
    those of all these tiles; `firsts` None = none."""
    begin, count = 0, 0
    if firsts is not None:
        begin = tl.load(firsts + sequence)
        count = tl.load(firsts + sequence + 1) - begin
    return before + begin, count


@triton.jit
def merged_states(  # type: ignore[no-untyped-def]
    states, first, second, third, which, d,
    QUERIES: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The highest log2 of a sum of weights, the sum of all relative to it and that of values [D],
    for one query, of three ranges of states: the first of each and how many."""
    before_third = first[1] + second[1]
    count = before_third + third[1]
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    summed = tl.zeros((STEP, D), tl.float32)
    for start in range(0, count, STEP):
        i = start + tl.arange(0, STEP)
        there = i < count
        at = tl.where(i < before_third, second[0] + i - first[1], third[0] + i - before_third)
        at = tl.where(i < first[1], first[0] + i, at).to(tl.int64) * QUERIES + which
        sums = tl.load(states[1] + at, mask=there, other=float("-inf"))
        mask = there[:, None] & (d < SIZE)[None, :]
        averages = tl.load(states[0] + at[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
        higher = tl.maximum(highest, tl.max(sums, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(sums - base)
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(share, 0)
        summed = summed * shrink + share[:, None] * averages
        highest = higher
    return highest, total, tl.sum(summed, 0)


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
    # In place of strides, which differ with T and for which Triton would compile the kernel anew.
    by_token = tuple(x.transpose(1, 2).is_contiguous() for x in (first, second))
    pairs = zip((first, second), by_token, strict=True)
    attentions = tuple(x if token_first else x.contiguous() for x, token_first in pairs)
    logsumexps = first_logsumexp.contiguous(), second_logsumexp.contiguous()
    merged = torch.empty(batch, tokens, heads, size, dtype=first.dtype, device=first.device)
    with on_device(first):
        _merge_two[(triton.cdiv(tokens, _TOKENS), heads, batch)](
            *(attentions, logsumexps, merged, tokens, heads),
            BY_TOKEN=by_token,
            SIZE=size,
            PADDED=padded(size),
            BLOCK=_TOKENS,
        )
    return merged


def merge_attention_reference(
    first: Tensor, first_logsumexp: Tensor, second: Tensor, second_logsumexp: Tensor
) -> Tensor:
    share = torch.sigmoid(first_logsumexp - second_logsumexp)[..., None]
    merged = first.float() * share + second.float() * (1 - share)
    return merged.to(first.dtype).transpose(1, 2).contiguous()


@triton.jit(do_not_specialize=["tokens", "heads"])
def _merge_two(  # type: ignore[no-untyped-def]
    attentions, logsumexps, merged, tokens, heads,
    BY_TOKEN: tl.constexpr,  # of each attention: it is [B, T, N, D] and not [B, N, T, D]
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    inside = t < tokens
    both = inside[:, None] & (d < SIZE)[None, :]
    by_head = (b * heads + head) * tokens + t
    by_token = (b * tokens + t) * heads + head
    difference = tl.load(logsumexps[0] + by_head, mask=inside, other=0.0)
    difference -= tl.load(logsumexps[1] + by_head, mask=inside, other=0.0)
    share = tl.sigmoid(difference)[:, None]
    first = (by_token if BY_TOKEN[0] else by_head)[:, None] * SIZE + d[None, :]
    second = (by_token if BY_TOKEN[1] else by_head)[:, None] * SIZE + d[None, :]
    x = tl.load(attentions[0] + first, mask=both, other=0.0).to(tl.float32)
    y = tl.load(attentions[1] + second, mask=both, other=0.0).to(tl.float32)
    result = x * share + y * (1 - share)
    to = merged + by_token[:, None] * SIZE + d[None, :]
    tl.store(to, result.to(merged.dtype.element_ty), mask=both)
