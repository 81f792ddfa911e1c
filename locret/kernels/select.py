"""Which units a full cache keeps, by a threshold instead of a sort.

One program a head finds the budget-th highest score by bisection over the order of the floats' bits
and writes the indices above it, in order: no sort, no top-k.
"""

import torch
from torch import Tensor

from locret.kernels.dispatch import on_device, padded, takes_triton, tl, triton

_RESIDENT = 32768  # scores of one head that one program holds in registers
_TILE = 4096  # scores that one program compacts at a time


def threshold_select(
    scores: Tensor, budget: int, protected_tail: int = 0, protected_head: int = 0
) -> Tensor:
    """Indices of the highest scores, ascending in each head.

    Args:
        scores: [B, H, S], any float dtype, compared as float32; higher = keep. Of equal scores the
            earliest units stay. -inf and inf are scores like others; NaN is the lowest of all.
        budget: units a head keeps, at least as many as are protected.
        protected_tail: how many of the last units are kept whatever they scored; they count
            towards the budget.
        protected_head: likewise, of the first units.

    Returns:
        Long [B, H, min(budget, S)].
    """
    assert min(protected_head, protected_tail) >= 0, (protected_head, protected_tail)
    assert protected_head + protected_tail <= budget, (protected_head, protected_tail, budget)
    size = scores.shape[-1]
    if size <= budget:
        return torch.arange(size, device=scores.device).expand(scores.shape)
    if not takes_triton(scores):
        return threshold_select_reference(scores, budget, protected_tail, protected_head)
    kept = torch.empty(*scores.shape[:2], budget, dtype=torch.long, device=scores.device)
    if kept.numel():
        _launch(scores, protected_tail, protected_head, kept)
    return kept


def threshold_select_reference(
    scores: Tensor, budget: int, protected_tail: int = 0, protected_head: int = 0
) -> Tensor:
    """The twin of `threshold_select` for budget < S, in plain PyTorch."""
    scores = scores.float()
    unit = torch.arange(scores.shape[-1], device=scores.device)
    last = scores.shape[-1] - protected_tail
    protected = (unit < protected_head) | (unit >= last)
    # Sorted twice, because NaN is below -inf and a protected unit above inf.
    rank = (~scores.isnan()).long().masked_fill(protected, 2)
    order = scores.nan_to_num(0.0, torch.inf, -torch.inf).argsort(
        dim=-1, descending=True, stable=True
    )
    by_rank = rank.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, by_rank[..., :budget]).sort(-1).values


def _launch(scores: Tensor, protected_tail: int, protected_head: int, kept: Tensor) -> None:
    batch, heads, size = scores.shape
    block = min(padded(size, least=16), _RESIDENT)
    with on_device(scores):
        _select[(heads, batch)](
            *(scores, kept, size, kept.shape[-1], protected_head, size - protected_tail),
            *scores.stride(),
            *kept.stride()[:2],
            BLOCK=block,
            TILE=min(block, _TILE),
            RESIDENT=size <= block,
            num_warps=min(32, max(1, block // 512)),
        )


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    scores,
    kept,
    size,
    budget,
    head_end,
    tail_start,
    scores_b,
    scores_h,
    scores_s,
    kept_b,
    kept_h,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    scores += tl.program_id(1).to(tl.int64) * scores_b + tl.program_id(0).to(tl.int64) * scores_h
    kept += tl.program_id(1).to(tl.int64) * kept_b + tl.program_id(0).to(tl.int64) * kept_h

    # The threshold is the largest order that at least `budget` units reach. It is found two bits
    # at a time; `above` counts the units strictly above the candidates that remain.
    threshold = tl.full((), -(2**31), tl.int32)
    above = tl.full((), 0, tl.int32)
    step = tl.full((), 2**30, tl.int32)
    if RESIDENT:
        order = _order(scores, tl.arange(0, BLOCK), size, head_end, tail_start, scores_s)
    for _ in range(16):
        if RESIDENT:
            n_1 = _reaching(order, threshold + step)
            n_2 = _reaching(order, threshold + step + step)
            n_3 = _reaching(order, threshold + step + step + step)
        else:
            n_1 = tl.full((), 0, tl.int32)
            n_2 = tl.full((), 0, tl.int32)
            n_3 = tl.full((), 0, tl.int32)
            for start in range(0, size, BLOCK):
                unit = start + tl.arange(0, BLOCK)
                block = _order(scores, unit, size, head_end, tail_start, scores_s)
                n_1 += _reaching(block, threshold + step)
                n_2 += _reaching(block, threshold + step + step)
                n_3 += _reaching(block, threshold + step + step + step)
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
        tile = _order(scores, at, size, head_end, tail_start, scores_s)
        is_above = tile > threshold
        is_tie = (tile == threshold) & (at < size)
        # Both counts in one scan: a tile is smaller than 2 ** 15.
        both = (is_above.to(tl.int32) << 16) | is_tie.to(tl.int32)
        counts = tl.cumsum(both, 0)
        total = tl.sum(both, 0)
        tie_rank = ties_before + (counts & 0xFFFF)
        place = above_before + (counts >> 16) + tl.minimum(tie_rank, ties) - 1
        stays = is_above | (is_tie & (tie_rank <= ties))
        tl.store(kept + place, at.to(tl.int64), mask=stays)
        above_before += total >> 16
        ties_before += total & 0xFFFF


@triton.jit
def _order(scores, unit, size, head_end, tail_start, stride):  # type: ignore[no-untyped-def]
    """Int32 that is ordered as the scores are: NaN lowest, protected units highest."""
    there = unit < size
    score = tl.load(scores + unit.to(tl.int64) * stride, mask=there, other=0.0).to(tl.float32)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(score != score, -(2**31), order)
    order = tl.where((unit < head_end) | (unit >= tail_start), 2**31 - 1, order)
    return tl.where(there, order, -(2**31))


@triton.jit
def _reaching(order, least):  # type: ignore[no-untyped-def]
    return tl.sum((order >= least).to(tl.int32), 0)
