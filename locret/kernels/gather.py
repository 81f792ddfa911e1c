"""Gathering: units of each sequence, old ones and new ones, into fresh storage.

What `torch.cat` of old and new units and a gather of each tensor give, without the copy in between
and in one launch for all tensors of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from locret.kernels.dispatch import (
    check_numbers,
    check_tensors,
    head_of,
    on_device,
    padded,
    takes_triton,
    tl,
    triton,
    units_at,
)


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
    check_numbers(shape[0] * shape[1], offsets)


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
