"""Whether each fused kernel agrees with its twin on this GPU: `benchmarks.kernels` checks it first.

A check yields "" for a setting that agrees and what differs otherwise.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_inputs import (
    plain_units,
    random,
    random_packed,
    random_rotated,
    running,
    topk,
    uneven,
    which_stay,
)
from locret.kernels import (
    PackedKV,
    RotatedKV,
    decode_packed,
    decode_sequences,
    expand_rotated,
    expand_units,
    gather_sequences,
    packed_shares,
    rotate_at_slots,
    select_sequences,
    store_units,
)
from locret.kernels.decode import decode_packed_reference, decode_sequences_reference
from locret.kernels.gather import gather_sequences_reference
from locret.kernels.packed import expand_rotated_reference, expand_units_reference
from locret.kernels.rotate import rotate_at_slots_reference, store_units_reference
from locret.kernels.select import select_sequences_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
HEADS = ((3, 3, 64), (8, 4, 128), (32, 1, 96), (2, 7, 80), (4, 16, 256))  # H, G, D
SLOTS = (1, 63, 1025)


def _compare(setting: Any, actual: Tensor, expected: Tensor) -> str:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{setting}: {actual.dtype}{tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not actual.is_floating_point():
        return "" if torch.equal(actual, expected) else f"{setting}: other values"
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    # A NaN is not near anything.
    return "" if error <= TOLERANCE[actual.dtype] else f"{setting}: relative error {error:.2e}"


def _some(*axes: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Settings in which every value of every axis occurs, not all of them with all others: each
    setting is compiled."""
    return itertools.islice(itertools.product(*axes), 0, None, 7)


def _check_rotate() -> Iterator[str]:
    for (heads, _, size), slots, dtype, part, pairing in _some(
        HEADS, SLOTS, DTYPES, (1, 4), ("half", "interleaved")
    ):
        x = random(2, heads, slots + 5, size, dtype=dtype)[:, :, 5:]
        cos, sin = random(2, 1 + part // 4, slots, size // part // 2 * 2, dtype=dtype).unbind()
        yield _compare(
            (heads, slots, size, dtype, part, pairing),
            rotate_at_slots(x, cos, sin, pairing),
            rotate_at_slots_reference(x, cos, sin, pairing),
        )


def _check_gather() -> Iterator[str]:
    for (heads, _, size), (count, new, keep), dtype in _some(
        HEADS, ((1025, 63, 800), (0, 7, 3), (129, 0, 64), (40000, 1024, 40000)), DTYPES
    ):
        lengths, setting = uneven(heads, count), (heads, size, count, new, keep, dtype)
        chosen = _chosen(lengths, new, keep)
        old = (random(sum(lengths), size, dtype=dtype), random(sum(lengths)))
        fresh = (random(1, heads, new, size, dtype=dtype), random(1, heads, new))
        gathered = gather_sequences(old, fresh, *chosen)
        expected = gather_sequences_reference(old, fresh, *chosen)
        same = all(map(torch.equal, gathered, expected))
        yield "" if same else f"{setting}: other values"


def _chosen(lengths: Sequence[int], new: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random units that stay, and where each sequence's begin before and after."""
    kept = [min(keep, length + new) for length in lengths]
    pairs = zip(lengths, kept, strict=True)
    index = [torch.randperm(length + new)[:n].sort().values for length, n in pairs]
    return torch.cat(index).cuda(), running(lengths), running(kept)


def _check_decode() -> Iterator[str]:
    for (heads, group, size), (count, tail), new, dtype in _some(
        HEADS, ((0, (64, 3)), (63, (200, 63)), (5000, (16, 5))), (1, 3), DTYPES
    ):
        for lengths in ([count] * 2 * heads, uneven(2 * heads, count)):
            query = random(2, heads * group, new, size, dtype=dtype)
            arguments = (query, plain_units(lengths, tail, size, dtype, rows=2), size**-0.5)
            yield _compare(
                (heads, group, size, count, lengths[0] == count, tail, new, dtype),
                decode_sequences(*arguments),
                decode_sequences_reference(*arguments),
            )


def _check_packed() -> Iterator[str]:
    for (heads, group, size), (count, bits), channels, new, dtype in _some(
        HEADS, ((63, 8), (63, 4), (5000, 4), (5000, 2)), (32, 64), (1, 3), DTYPES
    ):
        lengths = uneven(heads, count)
        packed = random_packed(lengths, size, bits, channels)
        setting = (heads, group, size, count, bits, channels, new, dtype)
        yield from _check_decoded(setting, packed, lengths, group, new, size, dtype)


def _check_rotated() -> Iterator[str]:
    for (heads, group, size), (count, bits), value_bits, new, dtype in _some(
        HEADS, ((63, 8), (63, 4), (5000, 4), (5000, 3), (5000, 2)), (2, 3), (1, 3), DTYPES
    ):
        lengths = uneven(heads, count)
        packed = random_rotated(lengths, size, bits, value_bits)
        setting = (heads, group, size, count, bits, value_bits, new, dtype)
        yield from _check_decoded(setting, packed, lengths, group, new, size, dtype)


def _check_decoded(
    setting: Any,
    packed: PackedKV | RotatedKV,
    lengths: Sequence[int],
    group: int,
    new: int,
    size: int,
    dtype: torch.dtype,
) -> Iterator[str]:
    heads = len(lengths)
    query = random(1, heads * group, new, size, dtype=dtype)
    shares = packed_shares(packed, lengths, group * new, dtype)
    plain = plain_units([16] * heads, (300, 200), size, dtype)
    arguments = (query, packed, shares, plain, size**-0.5)
    yield _compare(setting, decode_packed(*arguments), decode_packed_reference(*arguments))


def _check_expand() -> Iterator[str]:
    for (heads, _, size), (count, bits), channels, dtype in _some(
        HEADS, ((63, 8), (63, 4), (5000, 4), (5000, 2)), (32, 64), DTYPES
    ):
        packed = random_packed(uneven(heads, count), size, bits, channels)
        at = torch.randperm(packed.count + 9, device="cuda")[: packed.count]
        for units, starts in ((packed.keys, packed.starts), (packed.values, None)):
            out = torch.full((packed.count + 9, size), torch.nan, dtype=dtype, device="cuda")
            expand_units(units, bits, channels, out, starts, at)
            expected = expand_units_reference(units, bits, channels, size, starts).to(dtype)
            same = torch.equal(out[at], expected)
            yield "" if same else f"{(heads, size, count, bits, channels, dtype)}: differs"


def _check_expand_rotated() -> Iterator[str]:
    for (heads, _, size), bits, dtype in _some(HEADS, (2, 3, 4, 8), DTYPES):
        packed = random_rotated(uneven(heads, 500), size, bits, bits)
        for units, starts in ((packed.keys, packed.starts), (packed.values, None)):
            out = torch.full((packed.count, size), torch.nan, dtype=dtype, device="cuda")
            expand_rotated(units, packed.key_levels, out, starts)
            expected = expand_rotated_reference(units, packed.key_levels, size, starts)
            yield _compare((heads, size, bits, dtype), out, expected.to(dtype))


def _check_store() -> Iterator[str]:
    for (heads, _, size), dtype, slot in _some(HEADS, DTYPES, (0, 17, 62)):
        storage = random(2, 2, heads, 63, size, dtype=dtype)
        new = random(2, 2, heads, 1, size, dtype=dtype)
        expected = storage.clone()
        at = torch.tensor([slot], device="cuda")
        store_units(*storage, *new, at)
        store_units_reference(*expected, *new, at)
        yield "" if torch.equal(storage, expected) else f"{(heads, size, dtype, slot)}: differs"


def _check_select() -> Iterator[str]:
    for size, share, kind in itertools.product(
        (2, 63, 1025, 20480, 32768, 69632), (0.1, 0.8), ("distinct", "ties", "strange")
    ):
        new, lengths = size // 5, [size - size // 5] * 3 + uneven(3, size // 2)
        scores = random(sum(lengths) + 6 * new)
        if kind == "ties":
            scores = scores.round(decimals=1)
        if kind == "strange":
            strange = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0], device="cuda")
            scores[::3] = strange[torch.randint(0, 5, scores[::3].shape, device="cuda")]
        old, fresh = scores[: sum(lengths)], scores[sum(lengths) :].view(2, 3, new)
        kept = [math.ceil((length + new) * share) for length in lengths]
        for tails, heads in ((0, 0), (2, 3)):
            numbers = which_stay(lengths, kept, new, tails, heads)
            arguments = (old, fresh, running(lengths), numbers[0])
            yield _compare(
                (size, kind, share, tails, heads),
                select_sequences(*arguments, *numbers[1:]),
                select_sequences_reference(*arguments, *numbers[2:4]),
            )
            if kind == "distinct" and not tails:
                actual = select_sequences(*arguments, *numbers[1:])
                yield _compare((size, "topk", share), actual, topk(old, fresh, lengths, kept))


CHECKS: dict[str, Callable[[], Iterator[str]]] = {
    "rotate_at_slots": _check_rotate,
    "gather_sequences": _check_gather,
    "decode_sequences": _check_decode,
    "decode_packed": _check_packed,
    "decode_packed, rotated": _check_rotated,
    "expand_units": _check_expand,
    "expand_rotated": _check_expand_rotated,
    "store_units": _check_store,
    "select_sequences": _check_select,
}
