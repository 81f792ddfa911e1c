"""Selection: which units of each sequence stay, without a sort and without a top-k.

Scores are compared as integers that are ordered as floats are. Of few, one program a sequence finds
the lowest that stays by bisection. Of many, that is too much for one program and too little for a
GPU: programs share a sequence out in tiles and find the bits of the lowest score that stays eight
at a time, each time by counting how many units have which eight next. Then each tile knows which of
its units stay, and from the counts of the tiles before it where their indices go.
"""

import torch
from torch import Tensor

from locret.kernels.dispatch import (
    check_numbers,
    on_device,
    padded,
    takes_triton,
    tl,
    triton,
)

_RESIDENT = 8192  # scores of a sequence that one program holds in registers
_TILE = 4096  # scores of a longer one that a program takes; fewer than 2 ** 15
_WIDTH = 8  # bits of a score that a round finds


def select_sequences(
    old: Tensor,
    new: Tensor,
    offsets: Tensor,
    kept: Tensor,
    out_offsets: Tensor,
    tails: Tensor,
    heads: Tensor,
    total: int,
    longest: int,
) -> Tensor:
    """Indices of the highest scores of each sequence's old and, after them, new units, ascending.
    Returns long [total], each index counted from its sequence's first old unit.

    -inf and inf are scores like others, NaN is the lowest of all; of equal scores the earliest. On
    a CPU those that `torch.topk` chooses of each sequence.

    Args:
        old: [N] float32, the old scores of the B*H sequences one after the other; N >= 0.
        new: [B, H, T] float32, any strides; T >= 0.
        offsets: int32 [B*H + 1], where each sequence's old scores begin.
        kept: int32 [B*H], how many units a sequence keeps; all that it has, if those are fewer.
        out_offsets: int32 [B*H + 1], where each sequence's indices go: the running sum of what
            sequences keep. Not checked on a GPU.
        tails, heads: int32 [B*H], so many of the last, of the first units of a sequence are kept
            whatever they scored; together at most `kept`.
        total: out_offsets[-1].
        longest: the most units of a sequence, old and new.
    """
    numbers = {"kept": kept, "tails": tails, "heads": heads}
    _check_select(old, new, **numbers, offsets=offsets, out_offsets=out_offsets)
    if not takes_triton(old, new, offsets, out_offsets, *numbers.values()):
        return _select_on_cpu(old, new, offsets, **numbers)
    index = torch.empty(total, dtype=torch.long, device=old.device)
    if total:
        given = (old, new.contiguous(), offsets, kept, tails, heads, new.shape[2])
        with on_device(old):
            if longest <= _RESIDENT:
                _whole(given, out_offsets, index, longest)
            else:
                _in_tiles(given, out_offsets, index, triton.cdiv(longest, _TILE))
    return index


def _whole(given: tuple, out_offsets: Tensor, index: Tensor, longest: int) -> None:
    block = padded(longest, _TILE)
    warps = max(1, block // 512)
    _select[(len(out_offsets) - 1,)](*given, out_offsets, index, BLOCK=block, num_warps=warps)


def _in_tiles(given: tuple, out_offsets: Tensor, index: Tensor, tiles: int) -> None:
    sequences = len(out_offsets) - 1
    grid, how = (sequences, tiles), {"TILE": _TILE, "WIDTH": _WIDTH, "num_warps": 8}
    rounds = 32 // _WIDTH
    counts = index.new_zeros((sequences, rounds, 1 << _WIDTH), dtype=torch.int32)
    staying = index.new_empty((sequences, tiles), dtype=torch.int32)
    for done in range(rounds):
        _tally[grid](*given, counts, done, **how)
    _count[grid](*given, counts, staying, tiles, **how)
    _place[grid](*given, counts, staying, tiles, out_offsets, index, **how)


def select_sequences_reference(
    old: Tensor, new: Tensor, offsets: Tensor, kept: Tensor, tails: Tensor, heads: Tensor
) -> Tensor:
    """The twin of `select_sequences`, in plain PyTorch; it waits for the device."""
    chosen = []
    numbers = zip(kept.tolist(), tails.tolist(), heads.tolist(), strict=True)
    pairs = zip(old.split(offsets.diff().tolist()), new.flatten(0, 1), strict=True)
    for pair, (keep, tail, head) in zip(pairs, numbers, strict=True):
        scores = torch.cat(pair)
        unit = torch.arange(len(scores), device=scores.device)
        protected = (unit < head) | (unit >= len(scores) - tail)
        # Sorted twice, because NaN is below -inf and a protected unit above inf.
        rank = (~scores.isnan()).long().masked_fill(protected, 2)
        known = scores.nan_to_num(0.0, torch.inf, -torch.inf)
        order = known.argsort(descending=True, stable=True)
        by_rank = rank[order].argsort(descending=True, stable=True)
        chosen.append(order[by_rank[:keep]].sort().values)
    return torch.cat(chosen)


def _select_on_cpu(
    old: Tensor, new: Tensor, offsets: Tensor, kept: Tensor, tails: Tensor, heads: Tensor
) -> Tensor:
    """What `torch.topk` chooses of each sequence, whatever the others are: a row in a batch keeps
    what it keeps alone, ties too."""
    lengths = offsets.diff().tolist()
    numbers = [x.tolist() for x in (kept, tails, heads)]
    if all(len(set(each)) == 1 for each in (lengths, *numbers)):
        scores = torch.cat([old.view(*new.shape[:2], lengths[0]), new], dim=2)
        return _topk(scores, *(each[0] for each in numbers)).flatten()
    pairs = zip(old.split(lengths), new.flatten(0, 1), strict=True)
    each = zip(pairs, *numbers, strict=True)
    return torch.cat([_topk(torch.cat(pair), *how) for pair, *how in each])


def _topk(scores: Tensor, keep: int, tail: int, head: int) -> Tensor:
    """Indices of the `keep` highest of scores [..., S], of which the last and first ones are to be
    overwritten, ascending."""
    size = scores.shape[-1]
    if size <= keep:
        return torch.arange(size, device=scores.device).expand(scores.shape)
    scores[..., size - tail :] = torch.inf
    scores[..., :head] = torch.inf
    return scores.topk(keep, dim=-1, sorted=False).indices.sort(dim=-1).values


def _check_select(old: Tensor, new: Tensor, **per_sequence: Tensor) -> None:
    if old.dim() != 1 or new.dim() != 3 or not old.dtype == new.dtype == torch.float32:
        raise ValueError(
            f"old scores are {tuple(old.shape)} {old.dtype} and new ones {tuple(new.shape)} "
            f"{new.dtype}; expected [N] and [B, H, T] of torch.float32"
        )
    check_numbers(new.shape[0] * new.shape[1], per_sequence)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    old, new, offsets, kept, tails, heads, new_count
):
    """Where a sequence's scores are, how many it has, those outside which are protected, and how
    many stay."""
    sequence = tl.program_id(0)
    first = tl.load(offsets + sequence)
    old_count = tl.load(offsets + sequence + 1) - first
    size = old_count + new_count
    unprotected = (tl.load(heads + sequence), size - tl.load(tails + sequence))
    # Both are counted from the sequence's first old unit.
    new += sequence.to(tl.int64) * new_count - old_count
    return (
        (old + first, new, old_count),
        size,
        unprotected,
        tl.minimum(tl.load(kept + sequence), size),
    )


@triton.jit
def _order(where, unit, size, unprotected):  # type: ignore[no-untyped-def]
    """Int32 that is ordered as the scores are: NaN lowest, protected units highest.

    `where` is a pointer to the old scores, another to the new ones, and how many are old.
    """
    there = unit < size
    scores = tl.where(unit < where[2], where[0], where[1])
    score = tl.load(scores + unit, mask=there, other=0.0)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(score != score, -(2**31), order)
    order = tl.where((unit < unprotected[0]) | (unit >= unprotected[1]), 2**31 - 1, order)
    return tl.where(there, order, -(2**31))


@triton.jit(do_not_specialize=["new_count"])
def _select(  # type: ignore[no-untyped-def]
    old, new, offsets, kept, tails, heads, new_count, out_offsets, index, BLOCK: tl.constexpr
):
    where, size, unprotected, budget = _scores(old, new, offsets, kept, tails, heads, new_count)
    unit = tl.arange(0, BLOCK)
    order = _order(where, unit, size, unprotected)

    # The threshold is the largest order that at least `budget` units reach. It is found two bits
    # at a time; `above` counts the units strictly above the candidates that remain.
    threshold = tl.full((), -(2**31), tl.int32)
    above = tl.full((), 0, tl.int32)
    step = tl.full((), 2**30, tl.int32)
    for _ in range(16):
        n_1 = _reaching(order, threshold + step)
        n_2 = _reaching(order, threshold + step + step)
        n_3 = _reaching(order, threshold + step + step + step)
        if n_3 >= budget:
            threshold += step + step + step
        elif n_2 >= budget:
            threshold += step + step
            above = n_3
        elif n_1 >= budget:
            threshold += step
            above = n_2
        else:
            above = n_1
        step = step >> 2
    both = _both(order, threshold, unit < size)
    index += tl.load(out_offsets + tl.program_id(0))
    _write(index, unit, both, 0, 0, budget - above)


@triton.jit
def _reaching(order, least):  # type: ignore[no-untyped-def]
    return tl.sum((order >= least).to(tl.int32), 0)


@triton.jit(do_not_specialize=["new_count", "done"])
def _tally(  # type: ignore[no-untyped-def]
    old, new, offsets, kept, tails, heads, new_count, counts, done,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of the units whose first bits are those of the lowest score that stays, as far as `done`
    rounds have found them: how many have which bits next."""
    where, size, unprotected, budget = _scores(old, new, offsets, kept, tails, heads, new_count)
    unit = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if tl.program_id(1) * TILE < size:
        counts = _counts_of(counts, WIDTH)
        threshold, _ = _threshold(counts, done, budget, WIDTH)
        differs = _order(where, unit, size, unprotected) ^ threshold
        shift = 32 - WIDTH - done * WIDTH
        # To shift by all 32 bits is undefined.
        among = (unit < size) & ((done == 0) | (differs >> shift >> WIDTH == 0))
        digit = ((differs ^ threshold ^ -(2**31)) >> shift) & ((1 << WIDTH) - 1)
        found = tl.histogram(digit, 1 << WIDTH, mask=among)
        at = counts + (done << WIDTH) + tl.arange(0, 1 << WIDTH)
        tl.atomic_add(at, found, mask=found > 0, sem="relaxed")


@triton.jit
def _counts_of(counts, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The counts of the sequence at work."""
    return counts + tl.program_id(0) * (32 // WIDTH << WIDTH)


@triton.jit
def _threshold(counts, done, budget, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The order of the lowest score that stays, its bits as far as `done` rounds have found them
    and then zeros, and how many units are above all that begin so."""
    digits = tl.arange(0, 1 << WIDTH)
    rank = tl.full((), 0, tl.int32)
    above = tl.full((), 0, tl.int32)
    for i in range(done):
        found = tl.load(counts + (i << WIDTH) + digits)
        reaching = above + tl.sum(found, 0) - tl.cumsum(found, 0) + found
        digit = tl.max(tl.where(reaching >= budget, digits, 0), 0)
        above += tl.sum(tl.where(digits > digit, found, 0), 0)
        rank |= digit << (32 - WIDTH - i * WIDTH)
    return rank ^ -(2**31), above


@triton.jit(do_not_specialize=["new_count", "tiles"])
def _count(  # type: ignore[no-untyped-def]
    old, new, offsets, kept, tails, heads, new_count, counts, staying, tiles,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """How many units of each tile are above the lowest score that stays, and how many at it."""
    where, size, unprotected, budget = _scores(old, new, offsets, kept, tails, heads, new_count)
    threshold, _ = _threshold(_counts_of(counts, WIDTH), 32 // WIDTH, budget, WIDTH)
    unit = tl.program_id(1) * TILE + tl.arange(0, TILE)
    both = _both(_order(where, unit, size, unprotected), threshold, unit < size)
    tl.store(staying + tl.program_id(0) * tiles + tl.program_id(1), tl.sum(both, 0))


@triton.jit(do_not_specialize=["new_count", "tiles"])
def _place(  # type: ignore[no-untyped-def]
    old, new, offsets, kept, tails, heads, new_count, counts, staying, tiles, out_offsets, index,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the indices of a tile's units that stay."""
    where, size, unprotected, budget = _scores(old, new, offsets, kept, tails, heads, new_count)
    sequence, tile = tl.program_id(0), tl.program_id(1)
    if tile * TILE < size:
        above_before = tl.full((), 0, tl.int32)
        ties_before = tl.full((), 0, tl.int32)
        for start in range(0, tile, 256):
            at = start + tl.arange(0, 256)
            before = tl.load(staying + sequence * tiles + at, mask=at < tile, other=0)
            above_before += tl.sum(before >> 16, 0)
            ties_before += tl.sum(before & 0xFFFF, 0)
        threshold, above = _threshold(_counts_of(counts, WIDTH), 32 // WIDTH, budget, WIDTH)
        unit = tile * TILE + tl.arange(0, TILE)
        both = _both(_order(where, unit, size, unprotected), threshold, unit < size)
        index += tl.load(out_offsets + sequence)
        _write(index, unit, both, above_before, ties_before, budget - above)


@triton.jit
def _both(order, threshold, there):  # type: ignore[no-untyped-def]
    """2 ** 16 for a unit above the threshold, 1 for one at it: the sum of fewer than 2 ** 15 counts
    both."""
    return ((order > threshold).to(tl.int32) << 16) | ((order == threshold) & there).to(tl.int32)


@triton.jit
def _write(index, unit, both, above_before, ties_before, ties):  # type: ignore[no-untyped-def]
    """Indices of the units above the threshold, and of the first `ties` of a sequence at it, behind
    those of the units before these."""
    counts = tl.cumsum(both, 0)
    rank = ties_before + (counts & 0xFFFF)
    place = above_before + (counts >> 16) + tl.minimum(rank, ties) - 1
    stays = ((both >> 16) > 0) | ((both > 0) & (rank <= ties))
    tl.store(index + place, unit.to(tl.int64), mask=stays)
