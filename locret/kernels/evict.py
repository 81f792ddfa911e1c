"""Eviction: which units of each sequence stay, and those gathered into fresh storage.

One program a sequence finds the lowest score that stays by bisection over the order of the floats'
bits and writes the indices above it, in order: no sort, no top-k. `gather_sequences` is what
`torch.cat` of old and new units and a gather of each tensor give, without the copy in between and
in one launch for all tensors of a layer.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from locret.kernels.dispatch import (
    check_tensors,
    head_of,
    on_device,
    padded,
    takes_triton,
    tl,
    triton,
    units_at,
)

_RESIDENT = 32768  # scores of one head that one program holds in registers
_SWEPT = 16384  # of a longer one, least scores that it takes at a time: at most 1023 times
_TILE = 4096  # scores that one program compacts at a time


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
        resident = longest <= _RESIDENT
        block = padded(longest, _TILE) if resident else padded(longest // 1000, _SWEPT)
        with on_device(old):
            _select[(kept.numel(),)](
                *(old, new.contiguous(), offsets, kept, out_offsets, tails, heads, index),
                new.shape[2],
                BLOCK=block,
                TILE=_TILE,
                RESIDENT=resident,
                num_warps=min(32, max(1, block // 512)),
            )
    return index


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
    _check_numbers(new.shape[0] * new.shape[1], per_sequence)


def _check_numbers(sequences: int, named: Mapping[str, Tensor]) -> None:
    """Refuse what is not a number of each sequence, or one more of those called offsets."""
    for name, tensor in named.items():
        count = sequences + name.endswith("offsets")
        check_tensors({name: (tensor, torch.int32, (count,))})


@triton.jit(do_not_specialize=["new_count"])
def _select(  # type: ignore[no-untyped-def]
    old, new, offsets, kept, out_offsets, tails, heads, index, new_count,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    first = tl.load(offsets + sequence)
    old_count = tl.load(offsets + sequence + 1) - first
    size = old_count + new_count
    budget = tl.minimum(tl.load(kept + sequence), size)
    unprotected = (tl.load(heads + sequence), size - tl.load(tails + sequence))
    # Both are counted from the sequence's first old unit.
    new += sequence.to(tl.int64) * new_count - old_count
    where = (old + first, new, old_count)
    index += tl.load(out_offsets + sequence)

    # The threshold is the largest order that at least `budget` units reach. It is found two bits
    # at a time; `above` counts the units strictly above the candidates that remain.
    threshold = tl.full((), -(2**31), tl.int32)
    above = tl.full((), 0, tl.int32)
    step = tl.full((), 2**30, tl.int32)
    if RESIDENT:
        order = _order(where, tl.arange(0, BLOCK), size, unprotected)
    for _ in range(16):
        if RESIDENT:
            n_1 = _reaching(order, threshold + step)
            n_2 = _reaching(order, threshold + step + step)
            n_3 = _reaching(order, threshold + step + step + step)
        else:
            # Protected units reach whatever is asked; of the others, those of a lane are counted
            # first, all three numbers in one: a sum over lanes waits for every one of them.
            protected = unprotected[0] + size - unprotected[1]
            lanes = tl.zeros((BLOCK,), tl.int32)
            for start in range(unprotected[0], tl.minimum(old_count, unprotected[1]), BLOCK):
                unit = start + tl.arange(0, BLOCK)
                there = unit < tl.minimum(old_count, unprotected[1])
                lanes += _lanes(tl.load(where[0] + unit, there, float("nan")), threshold, step)
            for start in range(tl.maximum(old_count, unprotected[0]), unprotected[1], BLOCK):
                unit = start + tl.arange(0, BLOCK)
                there = unit < unprotected[1]
                lanes += _lanes(tl.load(where[1] + unit, there, float("nan")), threshold, step)
            n_1 = protected + tl.sum(lanes & 1023, 0)
            n_2 = protected + tl.sum((lanes >> 10) & 1023, 0)
            n_3 = protected + tl.sum(lanes >> 20, 0)
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

    # Those above the threshold stay, and the earliest of those at it.
    ties = budget - above
    above_before = tl.full((), 0, tl.int32)
    ties_before = tl.full((), 0, tl.int32)
    for start in range(0, size, TILE):
        at = start + tl.arange(0, TILE)
        tile = _order(where, at, size, unprotected)
        is_above = tile > threshold
        is_tie = (tile == threshold) & (at < size)
        # Both counts in one scan: a tile is smaller than 2 ** 15.
        both = (is_above.to(tl.int32) << 16) | is_tie.to(tl.int32)
        counts = tl.cumsum(both, 0)
        total = tl.sum(both, 0)
        tie_rank = ties_before + (counts & 0xFFFF)
        place = above_before + (counts >> 16) + tl.minimum(tie_rank, ties) - 1
        stays = is_above | (is_tie & (tie_rank <= ties))
        tl.store(index + place, at.to(tl.int64), mask=stays)
        above_before += total >> 16
        ties_before += total & 0xFFFF


@triton.jit
def _order(where, unit, size, unprotected):  # type: ignore[no-untyped-def]
    """Int32 that is ordered as the scores are: NaN lowest, protected units highest.

    `where` is a pointer to the old scores, another to the new ones, and how many are old.
    """
    there = unit < size
    scores = tl.where(unit < where[2], where[0], where[1])
    order = _ordered(tl.load(scores + unit, mask=there, other=0.0))
    order = tl.where((unit < unprotected[0]) | (unit >= unprotected[1]), 2**31 - 1, order)
    return tl.where(there, order, -(2**31))


@triton.jit
def _ordered(score):  # type: ignore[no-untyped-def]
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, -(2**31), order)


@triton.jit
def _lanes(score, threshold, step):  # type: ignore[no-untyped-def]
    """1 if a score reaches the first of three candidates, 2 ** 10 more if the second, 2 ** 20 more
    if the third."""
    order = _ordered(score)
    lanes = tl.where(order >= threshold + step, 1, 0)
    lanes += tl.where(order >= threshold + step + step, 1 << 10, 0)
    return lanes + tl.where(order >= threshold + step + step + step, 1 << 20, 0)


@triton.jit
def _reaching(order, least):  # type: ignore[no-untyped-def]
    return tl.sum((order >= least).to(tl.int32), 0)


def gather_sequences(
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    index: Tensor,
    offsets: Tensor,
    out_offsets: Tensor,
) -> tuple[Tensor, ...]:
    """The units at `index` of each sequence's old and, after them, new units.

    Args:
        old: tensors [N, D] or [N], each of its own dtype, D and strides: the old units of the B*H
            sequences one after the other; N >= 0.
        new: parallel to `old`: [B, H, T, D] or [B, H, T], any strides; T >= 0.
        index: [K] long, counted from its sequence's first old unit, as `select_sequences` gives it.
            Not checked on a GPU.
        offsets: int32 [B*H + 1], where each sequence's old units begin.
        out_offsets: int32 [B*H + 1], where each sequence's indices begin; the last is K.

    Returns:
        One contiguous tensor [K, D] or [K] for each of `old`.
    """
    _check_gather(old, new, index, offsets=offsets, out_offsets=out_offsets)
    if not takes_triton(index, offsets, out_offsets, *old, *new):
        return gather_sequences_reference(old, new, index, offsets, out_offsets)
    kept = index.shape[0]
    gathered = tuple(x.new_empty(kept, *x.shape[1:]) for x in old)
    if kept:
        sequences = offsets.numel() - 1
        sizes = tuple(units.shape[1] if units.dim() == 2 else 1 for units in old)
        widest = padded(max(sizes))
        old = tuple(x if x.dim() == 1 or x.stride(1) == 1 else x.contiguous() for x in old)
        new, strides = zip(*map(_with_strides, new, sizes), strict=True)
        at_once = max(16, 8192 // widest)
        with on_device(index):
            _gather[(triton.cdiv(kept, at_once),)](
                *(old, new, gathered, index.contiguous(), offsets, out_offsets),
                *(kept, sequences, sequences.bit_length(), *new[0].shape[1:3]),
                *(tuple(units.stride(0) for units in old), strides),
                SIZES=sizes,
                BLOCKS=tuple(padded(size) for size in sizes),
                UNITS=at_once,
                num_warps=4,
            )
    return gathered


def _with_strides(new: Tensor, size: int) -> tuple[Tensor, tuple[int, ...] | None]:
    """New units [B, H, T, D] or [B, H, T] as the kernel takes them, and their strides; None = they
    are contiguous.

    Triton compiles a kernel anew where 16 divides other strides than before, and loads widely where
    16 divides them. If it divides D, that is the same for all T; strides of others, such as scores,
    are not passed.
    """
    if size % 16:
        return new.contiguous(), None
    new = new if new.stride(3) == 1 else new.contiguous()
    return new, new.stride()[:3]


def gather_sequences_reference(
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    index: Tensor,
    offsets: Tensor,
    out_offsets: Tensor,
) -> tuple[Tensor, ...]:
    count = new[0].shape[2]
    to = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
    sequence = torch.searchsorted(out_offsets, to, right=True) - 1
    from_new = index - offsets.diff()[sequence]
    at_new = old[0].shape[0] + sequence * count + from_new
    at = torch.where(from_new < 0, index + offsets[sequence], at_new)
    return tuple(
        torch.cat([before, after.flatten(0, 2)]).index_select(0, at)
        for before, after in zip(old, new, strict=True)
    )


def _check_gather(
    old: Sequence[Tensor], new: Sequence[Tensor], index: Tensor, **offsets: Tensor
) -> None:
    if len(old) != len(new) or not old:
        raise ValueError(f"{len(old)} old tensors and {len(new)} new; expected as many of both")
    if index.dim() != 1 or index.dtype != torch.long:
        raise ValueError(f"index is {tuple(index.shape)} {index.dtype}; expected [K] of torch.long")
    units, shape = old[0].shape[:1], new[0].shape[:3]
    for i, (was, fresh) in enumerate(zip(old, new, strict=True)):
        size, dtype = was.shape[1:2], was.dtype
        expected = {f"old[{i}]": (was, dtype, (*units, *size))}
        expected[f"new[{i}]"] = (fresh, dtype, (*shape, *size))
        check_tensors(expected, contiguous=False)
    _check_numbers(shape[0] * shape[1], offsets)


@triton.jit(do_not_specialize=["kept", "sequences", "halvings", "heads", "new_count"])
def _gather(  # type: ignore[no-untyped-def]
    old, new, gathered, index, offsets, out_offsets, kept, sequences, halvings, heads, new_count,
    old_strides, new_strides,
    SIZES: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    to = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    there = to < kept
    unit = tl.load(index + to, mask=there, other=0)

    # The sequence whose indices the unit's is among: the last that begins at or before it.
    sequence = tl.zeros((UNITS,), tl.int32)
    after = tl.zeros((UNITS,), tl.int32) + sequences
    for _ in range(halvings):
        middle = (sequence + after) // 2
        is_before = tl.load(out_offsets + middle) <= to
        sequence = tl.where(is_before, middle, sequence)
        after = tl.where(is_before, after, middle)
    first = tl.load(offsets + sequence)
    old_count = tl.load(offsets + sequence + 1) - first
    is_old = unit < old_count
    b, h = head_of(sequence, heads)
    to = to.to(tl.int64)
    for i in tl.static_range(len(old)):
        d = tl.arange(0, BLOCKS[i])
        mask = there[:, None] & (d < SIZES[i])[None, :]
        at_old = old[i] + (first + unit) * old_strides[i]
        if new_strides[i] is None:
            at_new = new[i] + (sequence.to(tl.int64) * new_count + unit - old_count) * SIZES[i]
        else:
            at_new = units_at(new[i], new_strides[i], b, h, unit - old_count)
        units = tl.load(tl.where(is_old, at_old, at_new)[:, None] + d[None, :], mask=mask)
        tl.store(gathered[i] + to[:, None] * SIZES[i] + d[None, :], units, mask=mask)
