"""Small unsigned codes side by side in bytes: one, two or four codes a byte.

Planar layout. Along the packed axis, `size` codes take `packed_size(size, bits)` bytes; plane i of
byte j, its bits [i * bits, (i + 1) * bits), holds code j + i * packed_size. So the low halves of
the bytes are the first half of a head's channels in order, the high halves the second: a kernel
unpacks with a shift and a mask, and needs no interleaving. Codes that are missing from the last
plane are zero.
"""

import torch
from torch import Tensor

from locret.quantities import is_whole

BITS = (2, 4, 8)


def packed_size(size: int, bits: int) -> int:
    """Bytes that `size` codes of `bits` bits take."""
    return -(-size * bits // 8)


def check_bits(bits: int) -> None:
    """
    Raises:
        ValueError: `bits` is not a width that codes are packed in.
    """
    if not is_whole(bits, 1) or bits not in BITS:
        raise ValueError(f"bits is {bits!r}; expected one of {', '.join(map(str, BITS))}")


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack codes along one axis.

    Args:
        codes: uint8, any shape, each below 2 ** bits.
        bits: 2, 4 or 8.
        dim: the axis that shrinks from `size` to `packed_size(size, bits)`.

    Returns:
        uint8, contiguous if `dim` is the last axis.
    """
    assert codes.dtype == torch.uint8, codes.dtype
    check_bits(bits)
    if bits == 8:
        return codes
    codes = codes.movedim(dim, -1)
    room = packed_size(codes.shape[-1], bits)
    planes = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, room * planes - codes.shape[-1]))
    packed = codes[..., :room].clone()
    for plane in range(1, planes):
        packed |= codes[..., plane * room : (plane + 1) * room] << (plane * bits)
    return packed.movedim(-1, dim)


def unpack(packed: Tensor, bits: int, size: int, dim: int = -1) -> Tensor:
    """The codes that `pack` was given.

    Args:
        packed: uint8, `packed_size(size, bits)` long along `dim`.
        bits, dim: as packed.
        size: codes along `dim`.

    Returns:
        uint8, `size` long along `dim`.
    """
    assert packed.dtype == torch.uint8, packed.dtype
    assert packed.shape[dim] == packed_size(size, bits), (packed.shape, dim, bits, size)
    check_bits(bits)
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    planes = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.cat(planes, dim).narrow(dim, 0, size)
