"""Rotate queries or keys at their slots in one pass: one read and one write of x.

Any rotary embedding whose rotation turns pairs of dimensions fits: the caller gives the tables of
its slots. cos and sin are read once for several heads.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from locret.kernels.dispatch import on_device, padded, takes_triton, tl, triton, units_at

Pairing = Literal["half", "interleaved"]


def rotate_at_slots(
    x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing = "half", out: Tensor | None = None
) -> Tensor:
    """out[d] = x[d] cos[d] + x[partner(d)] sin[d] for d < R; the other dimensions are copied.

    Computed in float32 and rounded once.

    Args:
        x: [B, H, S, D], any float dtype, any strides.
        cos: [B or 1, S, R], R even and at most D.
        sin: likewise; it carries the sign, that is, sin[d] is negative where x[partner(d)] is to
            be subtracted.
        pairing: the partner of d is `half`: d + R/2 or d - R/2, as in Llama; `interleaved`: the
            other of (0, 1), (2, 3), ..., as in GPT-J and GLM.
        out: where to write, [B, H, S, D] of x's dtype; may be x itself. None = a new tensor.

    Returns:
        [B, H, S, D] in x's dtype.

    Raises:
        ValueError: shapes or the pairing do not fit.
    """
    batch, _, slots, size = x.shape
    _check_tables(cos, sin, size, (batch, slots), pairing)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not takes_triton(x, cos, sin, out):
        return out.copy_(rotate_at_slots_reference(x, cos, sin, pairing))
    if x.numel():
        _launch(x, cos, sin, None, pairing == "half", out)
    return out


def rotate_at_slots_reference(x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing) -> Tensor:
    """The twin of `rotate_at_slots`, in plain PyTorch."""
    size = cos.shape[-1]
    turned, rest = x[..., :size].float(), x[..., size:]
    if pairing == "half":
        partner = turned.roll(size // 2, dims=-1)
    else:
        partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = turned * cos.float()[:, None] + partner * sin.float()[:, None]
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def rotate_units(
    x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, pairing: Pairing = "half"
) -> Tensor:
    """Flat units rotated at slots of their own, as by `rotate_at_slots`.

    Args:
        x: [N, D], any float dtype, any strides.
        cos, sin: [S, R], the tables of all slots, R even and at most D.
        slots: int32 or int64 [N], each in 0 .. S - 1. Not checked on a GPU.
        pairing: the partner of a dimension.

    Returns:
        [N, D] in x's dtype.

    Raises:
        ValueError: shapes, a dtype or the pairing do not fit.
    """
    if x.dim() != 2 or slots.shape != x.shape[:1] or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"x is {tuple(x.shape)} and slots {tuple(slots.shape)} {slots.dtype}; "
            "expected [N, D] and [N] of int32 or int64"
        )
    _check_tables(cos[None], sin[None], x.shape[1], (1, None), pairing)
    if not takes_triton(x, cos, sin, slots):
        return rotate_units_reference(x, cos, sin, slots, pairing)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        tables = cos[None], sin[None], slots.contiguous()
        _launch(x[None, None], *tables, pairing == "half", out[None, None])
    return out


def rotate_units_reference(
    x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, pairing: Pairing
) -> Tensor:
    """The twin of `rotate_units`, in plain PyTorch."""
    cos, sin = (table.index_select(0, slots)[None] for table in (cos, sin))
    return rotate_at_slots_reference(x[None, None], cos, sin, pairing)[0, 0]


def _check_tables(
    cos: Tensor, sin: Tensor, size: int, expected: tuple[int, int | None], pairing: str
) -> None:
    """Refuse tables that are not [rows or 1, slots, R] for units of this size; slots None = any."""
    rows, slots = expected
    if pairing not in get_args(Pairing):
        raise ValueError(f"pairing is {pairing!r}; expected one of {get_args(Pairing)}")
    fits = cos.dim() == 3 and cos.shape[0] in (1, rows) and slots in (None, cos.shape[1])
    if not fits or cos.shape[2] > size or cos.shape[2] % 2 or sin.shape != cos.shape:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit units of {size}: "
            f"expected [{rows} or 1, {'any' if slots is None else slots}, an even number up to "
            f"{size}]"
        )


def _launch(
    x: Tensor, cos: Tensor, sin: Tensor, table_slots: Tensor | None, half: bool, out: Tensor
) -> None:
    """`table_slots` [S] says where in the tables the slots of x are; None = in order."""
    batch, heads, slots, size = x.shape
    rotary = cos.shape[2]
    pairs = padded(rotary // 2)
    at_once = max(1, min(padded(slots), 1024 // pairs))
    together = next(count for count in (8, 4, 3, 2, 1) if heads % count == 0)
    grid = (triton.cdiv(slots, at_once), heads // together, batch)
    with on_device(x):
        _rotate[grid](
            *(x, cos, sin, table_slots, out, slots),
            *(x.stride(), _table_strides(cos), _table_strides(sin), out.stride()),
            ROTARY=rotary,
            REST=size - rotary,
            PAIRS=pairs,
            REST_BLOCK=padded(size - rotary),
            SLOTS=at_once,
            HEADS=together,
            HALF=half,
            num_warps=4,
        )


def _table_strides(table: Tensor) -> tuple[int, ...]:
    """Strides of cos or sin; all rows of a batch share one table."""
    return (0, *table.stride()[1:]) if table.shape[0] == 1 else table.stride()


# Nothing is compiled anew for the number of slots.
@triton.jit(do_not_specialize=["slots"])
def _rotate(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    table_slots,
    out,
    slots,
    x_strides,
    cos_strides,
    sin_strides,
    out_strides,
    ROTARY: tl.constexpr,
    REST: tl.constexpr,
    PAIRS: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * HEADS
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)[:, None]
    x = units_at(x, x_strides, batch, head, slot)
    out = units_at(out, out_strides, batch, head, slot)
    there = slot < slots
    in_table = slot
    if table_slots is not None:
        in_table = tl.load(table_slots + slot, mask=there, other=0).to(tl.int64)
    cos += batch * cos_strides[0] + in_table * cos_strides[1]
    sin += batch * sin_strides[0] + in_table * sin_strides[1]
    x_h, x_d = x_strides[1], x_strides[3]
    out_h, out_d = out_strides[1], out_strides[3]
    cos_d, sin_d = cos_strides[2], sin_strides[2]
    if ROTARY > 0:
        if HALF:
            d = tl.arange(0, PAIRS)[None, :]
            mask = there & (d < ROTARY // 2)
            other = d + ROTARY // 2
            cos_1 = tl.load(cos + d * cos_d, mask=mask).to(tl.float32)
            cos_2 = tl.load(cos + other * cos_d, mask=mask).to(tl.float32)
            sin_1 = tl.load(sin + d * sin_d, mask=mask).to(tl.float32)
            sin_2 = tl.load(sin + other * sin_d, mask=mask).to(tl.float32)
            for h in tl.static_range(HEADS):
                x_1 = tl.load(x + h * x_h + d * x_d, mask=mask).to(tl.float32)
                x_2 = tl.load(x + h * x_h + other * x_d, mask=mask).to(tl.float32)
                turned_1 = (x_1 * cos_1 + x_2 * sin_1).to(out.dtype.element_ty)
                turned_2 = (x_2 * cos_2 + x_1 * sin_2).to(out.dtype.element_ty)
                tl.store(out + h * out_h + d * out_d, turned_1, mask=mask)
                tl.store(out + h * out_h + other * out_d, turned_2, mask=mask)
        else:
            d = tl.arange(0, 2 * PAIRS)[None, :]
            mask = there & (d < ROTARY)
            cos_1, cos_2 = _pairs(tl.load(cos + d * cos_d, mask=mask).to(tl.float32))
            sin_1, sin_2 = _pairs(tl.load(sin + d * sin_d, mask=mask).to(tl.float32))
            for h in tl.static_range(HEADS):
                x_1, x_2 = _pairs(tl.load(x + h * x_h + d * x_d, mask=mask).to(tl.float32))
                turned = tl.interleave(x_1 * cos_1 + x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2)
                tl.store(out + h * out_h + d * out_d, turned.to(out.dtype.element_ty), mask=mask)
    if REST > 0:
        d = tl.arange(0, REST_BLOCK)[None, :]
        mask = there & (d < REST)
        for h in tl.static_range(HEADS):
            rest = tl.load(x + h * x_h + (ROTARY + d) * x_d, mask=mask)
            tl.store(out + h * out_h + (ROTARY + d) * out_d, rest, mask=mask)


@triton.jit
def _pairs(block):  # type: ignore[no-untyped-def]
    """[SLOTS, 2 N] -> the even and the odd elements, [SLOTS, N] each."""
    return tl.split(tl.reshape(block, (block.shape[0], block.shape[1] // 2, 2)))
