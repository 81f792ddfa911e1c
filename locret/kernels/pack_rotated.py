"""Units into the codes of the scheme `rotated`: two launches for a layer's keys, two for values.

An eviction keeps some packed units, whose codes move as they are (`_keep_keys`, `_keep_values`),
and fresh ones, which are encoded; of keys, some blocks of packed units are encoded anew, for they
became thin (`_pack_keys`, `_pack_values`). A program encodes a block of keys, or a few values: it
gathers, decodes, takes the mean away, rotates by two products with signs, chooses levels twice, and
packs bits by a product with powers of two. Callers ask `dispatch.takes_triton` first;
the twin is the plain path of `locret.quantization.packed` with `locret.quantization.codes`.

N packed units, F fresh ones, K units kept, M blocks, D head size, a multiple of 8.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from locret.kernels.dispatch import check_tensors, multiprocessors, on_device, padded, tl, triton
from locret.kernels.packed import check_rotated
from locret.kernels.rotated_levels import bits_of, hadamard_at, level_of

_ELEMENTS = 4096  # that a program holds at a time
_COPIED = 64  # units whose codes a program moves at a time
_AT_ONCE = 4  # programs that encode, by multiprocessor


def pack_rotated_keys(
    old: tuple[Tensor, ...] | None,
    block: Tensor | None,
    fresh: Tensor,
    index: Tensor,
    kept: Tensor,
    starts: Tensor,
    levels: tuple[float, ...],
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The packed keys at `index`, in new blocks.

    Args:
        old: `keys` of `RotatedKV`: codes, scale, mean of the N units; None = N is 0.
        block: long [K], the old block of each packed unit at `index`, anything of fresh ones.
        fresh: [F, D], floating.
        index: long [K]; u < N is unit u of `old`, N + i unit i of `fresh`.
        kept: int32 [M], the old block whose units keep codes and mean; below 0, encode.
        starts: int32 [M + 1], of the new blocks.
        levels: those of `RotatedKV`.

    Returns:
        Codes, scale, mean, and int32 [1]: not 0 if a unit that was encoded cannot be stored.
    """
    size, blocks = fresh.shape[1], len(kept)
    new = _new(len(index), levels, fresh, blocks)
    old, block = old or _new(0, levels, fresh, 0), index if block is None else block
    _check(old, fresh, index, levels, block)
    check_tensors(
        {"kept": (kept, torch.int32, (blocks,)), "starts": (starts, torch.int32, (blocks + 1,))}
    )
    bad = fresh.new_zeros(1, dtype=torch.int32)
    if blocks:
        with on_device(fresh):
            _keep_keys[(blocks,)](old, index, kept, starts, new, **_rows(size, levels))
            _pack_keys[(min(blocks, _programs(fresh)),)](
                *(old, block, fresh, index, kept, starts, new, bad, len(old[0]), blocks),
                **_sizes(size, levels),
            )
    return new, bad


def pack_rotated_values(
    old: tuple[Tensor, ...] | None, fresh: Tensor, index: Tensor, levels: tuple[float, ...]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The packed values at `index`: codes and scale; otherwise as of `pack_rotated_keys`."""
    size = fresh.shape[1]
    new, bad = _new(len(index), levels, fresh), fresh.new_zeros(1, dtype=torch.int32)
    old = old or _new(0, levels, fresh)
    _check(old, fresh, index, levels)
    kept = len(index)
    if kept:
        grid = (triton.cdiv(kept, _COPIED),)
        with on_device(fresh):
            if len(old[0]):
                how = _rows(size, levels)
                _keep_values[grid](old, index, new, len(old[0]), kept, **how)
            _pack_values[grid](
                *(old, fresh, index, new, bad, len(old[0]), kept),
                **_sizes(size, levels),
                COPIED=_COPIED,
            )
    return new, bad


def fetch_rotated(
    old: tuple[Tensor, ...],
    block: Tensor | None,
    fresh: Tensor,
    index: Tensor,
    levels: tuple[float, ...],
) -> Tensor:
    """float32 [K, D], units in full; arguments as of `pack_rotated_keys`, of values no `block`."""
    size = fresh.shape[1]
    _check(old, fresh, index, levels, block)
    out = fresh.new_empty(len(index), size, dtype=torch.float32)
    if len(index):
        sizes = _sizes(size, levels)
        with on_device(fresh):
            _fetch[(triton.cdiv(len(index), sizes["UNITS"]),)](
                *(old, block, fresh, index, out, len(old[0]), len(index)), **sizes
            )
    return out


def _new(
    count: int, levels: tuple[float, ...], like: Tensor, blocks: int | None = None
) -> tuple[Tensor, ...]:
    """Room for codes and scales of units and, of keys, the means of blocks."""
    size = like.shape[1]
    codes = like.new_empty(count, size * bits_of(levels) // 8, dtype=torch.uint8)
    units = codes, like.new_empty(count, 1, dtype=torch.float16)
    return units if blocks is None else (*units, like.new_empty(blocks, size, dtype=torch.bfloat16))


def _check(
    old: tuple[Tensor, ...],
    fresh: Tensor,
    index: Tensor,
    levels: tuple[float, ...],
    block: Tensor | None = None,
) -> None:
    size = fresh.shape[1]
    ends = None if block is None else torch.empty(len(old[2]) + 1, dtype=torch.int32)
    check_rotated(old, levels, (len(old[0]), size), ends)
    check_tensors(
        {
            "fresh": (fresh, fresh.dtype, (len(fresh), size)),
            "index": (index, torch.long, (len(index),)),
            "block": (block, torch.long, (len(index),)),
        }
    )


def _rows(size: int, levels: tuple[float, ...]) -> dict[str, int]:
    """What kernels that copy are compiled for."""
    return {"SIZE": size, "ROW": size * bits_of(levels) // 8, "COPIED": _COPIED, "num_warps": 4}


def _programs(tensor: Tensor) -> int:
    return _AT_ONCE * multiprocessors(tensor.device)


def _sizes(size: int, levels: tuple[float, ...]) -> dict[str, Any]:
    bits, channels, upper = bits_of(levels), padded(size, least=16), np.array(levels, np.float32)
    return {
        "SIZE": size,
        "BITS": bits,
        "LEVELS": levels if bits < 8 else (),
        "BETWEEN": tuple(((upper[1:] + upper[:-1]) / 2).tolist()) if bits < 8 else (),
        "CHANNELS": channels,
        "UNITS": min(_COPIED, max(16, _ELEMENTS // channels // 2)),
        "num_warps": 4,
    }


@triton.jit
def _keep_keys(  # type: ignore[no-untyped-def]
    old, index, kept, starts, new, SIZE: tl.constexpr, ROW: tl.constexpr, COPIED: tl.constexpr
):
    """Codes, scales and mean of a block that keeps them. Apart from what encodes: copying waits for
    memory, and so needs many programs at once, which have few registers each."""
    b = tl.program_id(0).to(tl.int64)
    former = tl.load(kept + b).to(tl.int64)
    if former >= 0:
        first, end = tl.load(starts + b), tl.load(starts + b + 1)
        d = tl.arange(0, triton.next_power_of_2(SIZE))
        mean = tl.load(old[2] + former * SIZE + d, mask=d < SIZE, other=0.0)
        tl.store(new[2] + b * SIZE + d, mean, mask=d < SIZE)
        for at in range(first, end, COPIED):
            k = at + tl.arange(0, COPIED)
            unit = tl.load(index + k, mask=k < end, other=0)
            _copy(old, new, unit, k, k < end, ROW)


@triton.jit(do_not_specialize=["count", "blocks"])
def _pack_keys(  # type: ignore[no-untyped-def]
    old, old_block, fresh, index, kept, starts, new, bad, count, blocks,
    SIZE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, BETWEEN: tl.constexpr,
    CHANNELS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, CHANNELS)
    # Few blocks are encoded, so that a program looks through many.
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        if tl.load(kept + number) < 0:
            first, end = tl.load(starts + number), tl.load(starts + number + 1)
            total = tl.zeros((CHANNELS,), tl.float32)
            for at in range(first, end, UNITS):
                k = at + tl.arange(0, UNITS)
                x = _units(
                    *(old, old_block, fresh, index, k, k < end, d, count),
                    *(SIZE, BITS, LEVELS, CHANNELS, UNITS),
                )
                total += tl.sum(x, 0)
            mean = _as_bfloat16(total / (end - first).to(tl.float32))
            at_mean = new[2] + (tl.zeros((), tl.int64) + number) * SIZE + d
            tl.store(at_mean, mean.to(tl.bfloat16), mask=d < SIZE)
            for at in range(first, end, UNITS):
                k = at + tl.arange(0, UNITS)
                x = _units(
                    *(old, old_block, fresh, index, k, k < end, d, count),
                    *(SIZE, BITS, LEVELS, CHANNELS, UNITS),
                )
                _refuse(x, bad)
                away = tl.where((k < end)[:, None], x - mean[None, :], 0.0)
                z = _turned(away, SIZE, CHANNELS, UNITS)
                _encode(z, new, bad, k, k < end, d, SIZE, BITS, LEVELS, BETWEEN)


@triton.jit(do_not_specialize=["count", "kept"])
def _keep_values(  # type: ignore[no-untyped-def]
    old, index, new, count, kept, SIZE: tl.constexpr, ROW: tl.constexpr, COPIED: tl.constexpr
):
    k = tl.program_id(0).to(tl.int64) * COPIED + tl.arange(0, COPIED)
    unit = tl.load(index + k, mask=k < kept, other=0)
    _copy(old, new, unit, k, (k < kept) & (unit < count), ROW)


@triton.jit(do_not_specialize=["count", "kept"])
def _pack_values(  # type: ignore[no-untyped-def]
    old, fresh, index, new, bad, count, kept,
    SIZE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, BETWEEN: tl.constexpr,
    CHANNELS: tl.constexpr, UNITS: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * COPIED
    d = tl.arange(0, CHANNELS)
    every = first + tl.arange(0, COPIED)
    units = tl.load(index + every, mask=every < kept, other=0)
    # Padding is unit 0, which is fresh where nothing is packed: harmless.
    if tl.max((units >= count).to(tl.int32), 0) > 0:
        for at in range(0, COPIED, UNITS):
            k = first + at + tl.arange(0, UNITS)
            unit = tl.load(index + k, mask=k < kept, other=0)
            is_fresh = (k < kept) & (unit >= count)
            x = _fresh(fresh, unit - count, is_fresh, d, SIZE)
            _refuse(x, bad)
            z = _turned(x, SIZE, CHANNELS, UNITS)
            _encode(z, new, bad, k, is_fresh, d, SIZE, BITS, LEVELS, BETWEEN)


@triton.jit(do_not_specialize=["count", "kept"])
def _fetch(  # type: ignore[no-untyped-def]
    old, old_block, fresh, index, out, count, kept,
    SIZE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, BETWEEN: tl.constexpr,
    CHANNELS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    d = tl.arange(0, CHANNELS)
    x = _units(
        *(old, old_block, fresh, index, k, k < kept, d, count),
        *(SIZE, BITS, LEVELS, CHANNELS, UNITS),
    )
    mask = (k < kept)[:, None] & (d < SIZE)[None, :]
    tl.store(out + k[:, None] * SIZE + d[None, :], x, mask=mask)


@triton.jit
def _copy(old, new, unit, k, there, ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes and scales of packed units to the places `k`."""
    byte = tl.arange(0, triton.next_power_of_2(ROW))
    mask = there[:, None] & (byte < ROW)[None, :]
    codes = tl.load(old[0] + unit.to(tl.int64)[:, None] * ROW + byte[None, :], mask=mask, other=0)
    tl.store(new[0] + k.to(tl.int64)[:, None] * ROW + byte[None, :], codes, mask=mask)
    scale = tl.load(old[1] + unit, mask=there, other=0.0)
    tl.store(new[1] + k, scale, mask=there)


@triton.jit
def _fresh(fresh, unit, there, d, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 fresh units, zeros where there is none."""
    mask = there[:, None] & (d < SIZE)[None, :]
    return tl.load(fresh + unit[:, None] * SIZE + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _units(  # type: ignore[no-untyped-def]
    old, old_block, fresh, index, k, there, d, count,
    SIZE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, CHANNELS: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """float32 units in full, packed or fresh; zeros where there is none."""
    unit = tl.load(index + k, mask=there, other=0)
    x = _fresh(fresh, unit - count, there & (unit >= count), d, SIZE)
    is_old = there & (unit < count)
    if tl.max(is_old.to(tl.int32), 0) > 0:
        z = _stored(old, unit, is_old, d, SIZE, BITS, LEVELS)
        y = _turned(z, SIZE, CHANNELS, UNITS)
        if old_block is not None:
            block = tl.load(old_block + k, mask=is_old, other=0)
            mask = is_old[:, None] & (d < SIZE)[None, :]
            at = old[2] + block[:, None] * SIZE + d[None, :]
            y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(is_old[:, None], y, x)
    return x


@triton.jit
def _stored(  # type: ignore[no-untyped-def]
    old, unit, there, d, SIZE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr
):
    """scale * level[code] of packed units, float32, zeros where there is none."""
    WIDTH: tl.constexpr = BITS - BITS % 2
    PLANE: tl.constexpr = SIZE * WIDTH // 8
    at = old[0] + unit[:, None] * (SIZE * BITS // 8)
    mask = there[:, None] & (d < SIZE)[None, :]
    code = tl.load(at + (d % PLANE)[None, :], mask=mask, other=0).to(tl.int32)
    code = (code >> (d // PLANE * WIDTH)[None, :]) & ((1 << WIDTH) - 1)
    if BITS == 3:
        HIGH: tl.constexpr = SIZE // 8
        high = tl.load(at + PLANE + (d % HIGH)[None, :], mask=mask, other=0).to(tl.int32)
        code += ((high >> (d // HIGH)[None, :]) & 1) << 2
    scale = tl.load(old[1] + unit, mask=there, other=0.0).to(tl.float32)
    return tl.where(mask, level_of(code, BITS, LEVELS) * scale[:, None], 0.0)


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    x, SIZE: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr
):
    """H x. Of more than 64 channels H is a product of two: among each 16 that follow each other,
    and among those 16 apart. Tensor cores want 16 numbers a row, which these are of as many units
    as it takes. The H of 64 must not be taken apart so: on Hopper its second product was wrong."""
    if CHANNELS <= 64:
        i = tl.arange(0, CHANNELS)
        x = _times(x, hadamard_at(i[:, None], i[None, :], SIZE))
    else:
        HIGH: tl.constexpr = CHANNELS // 16
        i = tl.arange(0, 16)
        x = tl.reshape(x, (UNITS * HIGH, 16))
        x = _times(x, hadamard_at(i[:, None], i[None, :], SIZE))
        if SIZE & -SIZE > 16:
            TOGETHER: tl.constexpr = max(1, 16 // HIGH)
            WIDE: tl.constexpr = TOGETHER * HIGH
            j = tl.arange(0, WIDE)
            one, other = j[:, None], j[None, :]
            signs = hadamard_at(one % HIGH, other % HIGH, SIZE // 16)
            x = tl.permute(tl.reshape(x, (UNITS // TOGETHER, WIDE, 16)), (0, 2, 1))
            x = tl.reshape(x, (UNITS // TOGETHER * 16, WIDE))
            x = _times(x, tl.where(one // HIGH == other // HIGH, signs, 0.0))
            x = tl.permute(tl.reshape(x, (UNITS // TOGETHER, 16, WIDE)), (0, 2, 1))
    return tl.reshape(x, (UNITS, CHANNELS)) * (SIZE & -SIZE) ** -0.5


@triton.jit
def _times(x, signs):  # type: ignore[no-untyped-def]
    """A product of float32, three of tf32: to all but its last digits."""
    return tl.dot(x, signs, input_precision="tf32x3")


@triton.jit
def _as_bfloat16(x):  # type: ignore[no-untyped-def]
    """float32, rounded to what bfloat16 holds: the interpreter's own conversion cuts off."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _refuse(x, bad):  # type: ignore[no-untyped-def]
    """Say so in `bad` where a number is not finite, or too large."""
    wrong = tl.sum(tl.where(tl.abs(x) <= 32768.0, 0, 1))  # `LARGEST` of `quantization.codes`
    tl.store(bad, 1, mask=wrong > 0)


@triton.jit
def _encode(  # type: ignore[no-untyped-def]
    z, new, bad, k, there, d,
    SIZE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    """Codes and scale of rotated units to the places `k`."""
    size = tl.max(tl.abs(z), 1) / 127.5 if BITS == 8 else tl.sqrt(tl.sum(z * z, 1) / SIZE)
    code, size = _nearest(z, size, d, SIZE, BITS, LEVELS, BETWEEN)
    code, size = _nearest(z, size, d, SIZE, BITS, LEVELS, BETWEEN)
    tl.store(bad, 1, mask=tl.sum(tl.where(tl.abs(size) <= 65504.0, 0, 1)) > 0)
    tl.store(new[1] + k, size.to(tl.float16), mask=there)
    row = new[0] + k.to(tl.int64)[:, None] * (SIZE * BITS // 8)
    if BITS == 8:
        mask = there[:, None] & (d < SIZE)[None, :]
        tl.store(row + d[None, :], code.to(tl.uint8), mask=mask)
    else:
        WIDTH: tl.constexpr = BITS - BITS % 2
        _store_plane(row, code & ((1 << WIDTH) - 1), there, d, SIZE, WIDTH)
        if BITS == 3:
            _store_plane(row + SIZE // 4, code >> 2, there, d, SIZE, 1)


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]
    z, size, d, SIZE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, BETWEEN: tl.constexpr
):
    """Codes, int32, of the levels nearest to z / size, and the scale of least error for them."""
    steps = z / tl.maximum(size, 1e-30)[:, None]  # a unit of zeros does not divide by zero
    if BITS == 8:
        code = tl.minimum(tl.maximum(tl.ceil(steps + 127.0), 0.0), 255.0).to(tl.int32)
        level = level_of(code, BITS, LEVELS)
    else:
        HALF: tl.constexpr = 1 << (BITS - 1)
        far = tl.abs(steps)
        step = tl.zeros(z.shape, tl.int32)
        level = tl.full(z.shape, LEVELS[0], tl.float32)
        for i in tl.static_range(HALF - 1):
            farther = far > BETWEEN[i]
            step += farther.to(tl.int32)
            level = tl.where(farther, LEVELS[i + 1], level)
        code = tl.where(steps > 0.0, HALF + step, HALF - 1 - step)
        level = tl.where(steps > 0.0, level, -level)
    chosen = tl.where((d < SIZE)[None, :], level, 0.0)
    return code, tl.sum(z * chosen, 1) / tl.sum(chosen * chosen, 1)


@triton.jit
def _store_plane(  # type: ignore[no-untyped-def]
    row, code, there, d, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """Codes of WIDTH bits as bytes: their sums, each times the power of two of its place, which
    float16 holds exactly, and so does the sum below 256."""
    PLANE: tl.constexpr = SIZE * WIDTH // 8
    BYTES: tl.constexpr = max(16, triton.next_power_of_2(PLANE))
    byte = tl.arange(0, BYTES)
    shift = 1 << (d // PLANE * WIDTH)
    power = tl.where((d % PLANE)[:, None] == byte[None, :], shift[:, None], 0)
    power = tl.where((d < SIZE)[:, None], power, 0)
    packed = tl.dot(code.to(tl.float16), power.to(tl.float16), out_dtype=tl.float32)
    mask = there[:, None] & (byte < PLANE)[None, :]
    tl.store(row + byte[None, :], packed.to(tl.int32).to(tl.uint8), mask=mask)
