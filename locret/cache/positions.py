"""Source positions of a context that stays: a bit for every token read, set where a unit is held.

A row whose heads hold few of very many tokens keeps its numbers, which are fewer bytes then.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from locret.cache.sequences import Sequences
from locret.quantization.codes import pack, unpack

BYTE = 8


def packed_positions(positions: Tensor, sequences: Sequences) -> tuple[Tensor, ...]:
    """A tensor for each row: bits uint8 [H, W], or its numbers int32, whichever is smaller.

    The host waits for the device, to learn how many tokens a row has read.

    Args:
        positions: int32 [N], ascending in each of the `sequences`, at least 0.
    """
    rows = [sequences.take([row]) for row in range(sequences.shape[0])]
    each = zip(positions.split([row.total for row in rows]), rows, strict=True)
    return tuple(_packed(own, row) for own, row in each)


def _packed(positions: Tensor, row: Sequences) -> Tensor:
    heads, last = row.shape[1], int(positions.max()) if len(positions) else -1
    tokens = (last // BYTE + 1) * BYTE
    if not 0 < heads * tokens < BYTE * positions.nbytes:
        return positions.clone()
    bits = torch.zeros(heads, tokens, dtype=torch.uint8, device=positions.device)
    bits[row.owner, positions.long()] = 1
    return pack(bits, 1)


def unpacked_positions(rows: Sequence[Tensor]) -> Tensor:
    """The int32 [N] that `packed_positions` was given."""
    return torch.cat([_unpacked(row) if row.dtype == torch.uint8 else row for row in rows])


def _unpacked(bits: Tensor) -> Tensor:
    return unpack(bits, 1, bits.shape[1] * BYTE).nonzero()[:, 1].int()


def positions_bytes(units: int, heads: int, tokens: int) -> int:
    """Most bytes of a row of that many units in all heads, of so many tokens read."""
    return min(units * torch.int32.itemsize, heads * -(-tokens // BYTE))
