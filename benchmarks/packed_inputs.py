"""Random packed units on a GPU, and what the kernels that decode them take beside."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locret.kernels import PackedKV, RotatedKV, decode_shares
from locret.quantization.rotated import POSITIVE_LEVELS


def uneven(heads: int, count: int) -> list[int]:
    """Units of heads that keep `count` on average, one of them none."""
    share = torch.rand(heads).argsort().float()
    return (share * (count * heads / share.sum().clamp(min=1.0))).long().tolist()


def after_packed(
    heads: int, plain: int, tail: tuple[int, int], size: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """What `decode_packed` takes after packed units: so many plain ones a head, and a tail of this
    capacity and length."""
    units = _random(2, heads * plain, size, dtype=dtype)
    tails = _random(2, 1, heads, tail[0], size, dtype=dtype)
    tails[:, :, :, tail[1] :] = torch.nan
    filled = torch.tensor([tail[1]], dtype=torch.int32, device="cuda")
    return *units, decode_shares([plain] * heads, units.device), *tails, filled, size**-0.5


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
    entries = (_random(2, len(starts) - 1, size) / 2**bits).half()
    tables = (_random(2, count, -(-size // group)) / 2**bits).half()
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
    mean = _random(len(starts) - 1, size, dtype=torch.bfloat16)
    levels = POSITIVE_LEVELS[key_bits], POSITIVE_LEVELS[value_bits]
    return RotatedKV((*sides[0], mean), starts, sides[1], *levels, 64)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)
