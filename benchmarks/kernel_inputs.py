"""Random units on a GPU, packed or not, as the kernels take them."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from locret.kernels import PackedKV, Plain, RotatedKV, decode_shares
from locret.quantization.codes import POSITIVE_LEVELS


def uneven(heads: int, count: int) -> list[int]:
    """Units of heads that keep `count` on average, one of them none."""
    share = torch.rand(heads).argsort().float()
    return (share * (count * heads / share.sum().clamp(min=1.0))).long().tolist()


def plain_units(
    lengths: Sequence[int], tail: tuple[int, int], size: int, dtype: torch.dtype, rows: int = 1
) -> Plain:
    """Contexts of these lengths, and tails of this capacity and length."""
    units = random(2, sum(lengths), size, dtype=dtype)
    tails = random(2, rows, len(lengths) // rows, tail[0], size, dtype=dtype)
    tails[:, :, :, tail[1] :] = torch.nan
    filled = torch.tensor([tail[1]], dtype=torch.int32, device="cuda")
    return Plain(*units, decode_shares(lengths, units.device), *tails, filled)


def _starts(lengths: Sequence[int], group: int) -> Tensor:
    """Blocks of such sequences, of which an eviction has left three quarters."""
    ends = [0]
    for length in lengths:
        blocks = -(-length * 4 // (3 * group))
        block = torch.rand(blocks * group).argsort()[:length] // group
        ends += [ends[-1] + n for n in block.bincount().cumsum(0).unique().tolist()]
    return torch.tensor(ends, dtype=torch.int32).unique().cuda()


def random_packed(lengths: Sequence[int], size: int, bits: int, group: int) -> PackedKV:
    """Random packed units."""
    count, starts = sum(lengths), _starts(lengths, group)
    shape = (2, count, -(-size * bits // 8))
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    entries = (random(2, len(starts) - 1, size) / 2**bits).half()
    tables = (random(2, count, -(-size // group)) / 2**bits).half()
    return PackedKV((codes[0], *entries), starts, (codes[1], *tables), bits, group)


def random_rotated(lengths: Sequence[int], size: int, key_bits: int, value_bits: int) -> RotatedKV:
    """Random rotated units."""
    starts = _starts(lengths, 64)
    sides = []
    for bits in (key_bits, value_bits):
        shape = (sum(lengths), size * bits // 8)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        scale = (0.5 + torch.rand(sum(lengths), 1, device="cuda")) / POSITIVE_LEVELS[bits][-1]
        sides.append((codes, scale.half()))
    mean = random(len(starts) - 1, size, dtype=torch.bfloat16)
    levels = POSITIVE_LEVELS[key_bits], POSITIVE_LEVELS[value_bits]
    return RotatedKV((*sides[0], mean), starts, sides[1], *levels, 64)


def running(numbers: Sequence[int]) -> Tensor:
    """int32: 0, and the sum up to each number."""
    return torch.tensor([*accumulate(numbers, initial=0)], device="cuda").int()


def which_stay(
    lengths: Sequence[int], kept: Sequence[int], new: int, tails: int, heads: int
) -> tuple[Any, ...]:
    """What `select_sequences` takes after the offsets, of so many new units; a 1 / `tails` and a
    1 / `heads` of the units kept are protected, 0 = none."""
    protected = ([n // share if share else 0 for n in kept] for share in (tails, heads))
    keep, last, first = (torch.tensor(x, device="cuda").int() for x in (kept, *protected))
    return keep, running(kept), last, first, sum(kept), max(lengths) + new


def topk(old: Tensor, new: Tensor, lengths: Sequence[int], kept: Sequence[int]) -> Tensor:
    """What `select_sequences` chooses of distinct scores, a call for each where sequences are
    unequal."""
    if len(set(lengths)) == 1:
        scores = torch.cat([old.view(*new.shape[:2], lengths[0]), new], 2)
        return scores.topk(kept[0], sorted=False).indices.sort().values.flatten()
    pairs = zip(old.split([*lengths]), new.flatten(0, 1), kept, strict=True)
    return torch.cat(
        [torch.cat(pair).topk(n, sorted=False).indices.sort().values for *pair, n in pairs]
    )


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed numbers."""
    return torch.randn(shape, device="cuda").to(dtype)
