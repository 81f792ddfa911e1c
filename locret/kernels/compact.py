"""Gather the units that stay, of those held and of the new ones, into fresh storage.

What `torch.cat` of both and a gather of each tensor give, without the copy in between and in one
launch for all tensors of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from locret.kernels.dispatch import on_device, padded, takes_triton, tl, triton


def gather_units(
    held: Sequence[Tensor], new: Sequence[Tensor], index: Tensor, room: int = 0
) -> tuple[Tensor, ...]:
    """The units at `index` of held and new units laid one after the other.

    Args:
        held: tensors [B, H, S, D] or [B, H, S], each of its own dtype, D and strides; S >= 0.
        new: parallel to `held`: [B, H, T, D] or [B, H, T]; T >= 0.
        index: [B, H, K] long, each in 0 .. S + T - 1; units S and up are new. Not checked on a GPU.
        room: how many units more than K the storage takes.

    Returns:
        One contiguous tensor [B, H, K + room, D] or [B, H, K + room] for each of `held`; the last
        `room` units are uninitialised.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(held, new, index)
    shape = (*index.shape[:2], index.shape[2] + room)
    storage = tuple(
        torch.empty(*shape, *tensor.shape[3:], dtype=tensor.dtype, device=tensor.device)
        for tensor in held
    )
    if not takes_triton(index, *held, *new):
        kept = gather_units_reference(held, new, index)
        for whole, units in zip(storage, kept, strict=True):
            whole[:, :, : index.shape[2]] = units
    elif index.numel():
        _launch(tuple(held), tuple(new), index, storage)
    return storage


def gather_units_reference(
    held: Sequence[Tensor], new: Sequence[Tensor], index: Tensor
) -> tuple[Tensor, ...]:
    """The twin of `gather_units` without room, in plain PyTorch."""
    both = (torch.cat(pair, dim=2) for pair in zip(held, new, strict=True))
    return tuple(
        units.gather(
            2,
            index.reshape(*index.shape, *[1] * (units.dim() - 3)).expand(
                *index.shape, *units.shape[3:]
            ),
        )
        for units in both
    )


def _check(held: Sequence[Tensor], new: Sequence[Tensor], index: Tensor) -> None:
    if len(held) != len(new) or not held:
        raise ValueError(f"{len(held)} tensors held and {len(new)} new; expected as many of both")
    if index.dim() != 3 or index.dtype != torch.long:
        raise ValueError(
            f"index is {tuple(index.shape)} {index.dtype}; expected [B, H, K] of torch.long"
        )
    for old, fresh in zip(held, new, strict=True):
        units = (held[0].shape[2], new[0].shape[2])
        fits = (
            old.dim() in (3, 4)
            and old.dtype == fresh.dtype
            and old.shape[:2] == fresh.shape[:2] == index.shape[:2]
            and old.shape[3:] == fresh.shape[3:]
            and (old.shape[2], fresh.shape[2]) == units
        )
        if not fits:
            raise ValueError(
                f"{tuple(old.shape)} {old.dtype} held and {tuple(fresh.shape)} {fresh.dtype} new "
                f"do not fit an index of {tuple(index.shape)}: expected [B, H, S] or [B, H, S, D] "
                f"and the same with T, S = {units[0]} and T = {units[1]} in all tensors"
            )


def _launch(
    held: tuple[Tensor, ...], new: tuple[Tensor, ...], index: Tensor, storage: tuple[Tensor, ...]
) -> None:
    batch, heads, kept = index.shape
    sizes = tuple(units.shape[3] if units.dim() == 4 else 1 for units in held)
    widest = padded(max(sizes))
    held, new = tuple(map(_rows, held)), tuple(map(_rows, new))
    rows = max(16, min(padded(kept, least=16), 8192 // widest))
    with on_device(index):
        _gather[(triton.cdiv(kept, rows), heads, batch)](
            *(held, new, storage, index, kept, held[0].shape[2]),
            *index.stride(),
            tuple(units.stride()[:3] for units in held),
            tuple(units.stride()[:3] for units in new),
            tuple(units.stride()[:3] for units in storage),
            SIZES=sizes,
            BLOCKS=tuple(padded(size) for size in sizes),
            ROWS=rows,
            num_warps=4,
        )


def _rows(units: Tensor) -> Tensor:
    """`units` with the elements of a unit side by side."""
    return units if units.dim() == 3 or units.stride(3) == 1 else units.contiguous()


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    held,
    new,
    storage,
    index,
    kept,
    border,
    index_b,
    index_h,
    index_k,
    held_strides,
    new_strides,
    storage_strides,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    to = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = to < kept
    unit = tl.load(index + b * index_b + h * index_h + to * index_k, mask=there, other=0)
    is_held = unit < border
    for i in tl.static_range(len(held)):
        d = tl.arange(0, BLOCKS[i])
        mask = there[:, None] & (d < SIZES[i])[None, :]
        strides = held_strides[i]
        old = held[i] + b * strides[0] + h * strides[1] + unit * strides[2]
        strides = new_strides[i]
        fresh = new[i] + b * strides[0] + h * strides[1] + (unit - border) * strides[2]
        units = tl.load(tl.where(is_held, old, fresh)[:, None] + d[None, :], mask=mask)
        strides = storage_strides[i]
        row = storage[i] + b * strides[0] + h * strides[1] + to * strides[2]
        tl.store(row[:, None] + d[None, :], units, mask=mask)
