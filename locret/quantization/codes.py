"""Values as small codes: groups with one scale each, rotated units, codes in bytes, outliers.

**Groups**, x ~ minimum + scale * code (KIVI, arXiv 2402.02750, section 3.1). For a group with
smallest value `low` and largest value `high`, and Q = 2 ** bits - 1:

    minimum = low,   scale = (high - low) / Q,   code = clamp(round((x - minimum) / scale), 0, Q)

Scale and minimum are stored as float16, and float16 is also the finest precision in which values
are looked at (bfloat16 values are float16 values too, within float16's range; float32 is rounded).
Math is in float32.

Error: |x - (minimum + scale * code)| <= scale / 2 + STORAGE_ERROR for an x that float16 holds.
Rounding the scale down leaves `high` at most Q * scale * 2 ** -11 above the last code, which is
less than half a step at 8 bits or fewer; rounding the scale up costs nothing but that much step.

Quantizing again what was dequantized to the input's type gives the same codes, scale and minimum
(float32 goes as float16 does). Why: `low` has code 0 and comes back exactly, `high` has Q. With
w = minimum + Q * scale and y its rounding, either y is so near to w that (y - minimum) / Q rounds
to the same scale again; or it is not, and then `high`, itself a value of that type and no farther
from w than that, is what w rounds to. The same holds of every code, with half a step for the
distance. Float16 has twice the spacing above a power of two as below, so a scale that is one can
miss on the wide side; its second derivation, from y, lands beside it and stays (`_stable_scale`).

**Rotated units.** A rotation by a Hadamard matrix H (orthonormal, its own inverse) spreads what is
large in a few channels over all of them, so that the elements of z = H x are nearly normal, and one
table of levels fits every model, layer and head: z ~ zq = scale * level[code], with the code whose
level is nearest to z / r.

- 2, 3, 4 bits: r = root mean square of z, and levels are those of Lloyd and Max for N(0, 1), which
  lose 11.7 %, 3.45 % and 0.95 % of the energy.
- 8 bits: r = max |z| / 127.5 and levels are code - 127.5. An even grid up to a unit's own largest
  element needs no table and loses about what the 256 levels of Lloyd and Max do: 0.82 of it at
  D = 64, 0.98 at 128, 1.15 at 256.
- scale = <z, level> / <level, level>, a float16 a unit: it makes <z, zq> = <zq, zq>, the least
  error that these codes allow, so that an inner product with zq is, on average, that with z. Codes
  are then chosen once more, with r = scale.

**Bytes**, planar. `size` codes take `packed_size(size, bits)` bytes; plane i of
byte j, its bits [i * bits, (i + 1) * bits), holds code j + i * packed_size. So the low halves of
the bytes are the first half of a head's channels in order, the high halves the second: a kernel
unpacks with a shift and a mask, and needs no interleaving. Codes that are missing from the last
plane are zero. Codes of 3 bits are 2 bits and then 1, packed one after the other.

**Outliers** (KVQuant, arXiv 2401.18079, section 3.4) are kept as they are, so that they do not
stretch the steps of all others: of each unit how many, and their channels and values.

N units, D head size, d packed size, O outliers in all. "..." is any shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from locret.quantities import is_whole
from locret.quantization.waiting import LARGEST, refuse_where

BITS = (2, 4, 8)
"""Bits that a code of a group may have."""

WIDTHS = (1, *BITS)
"""Bits that are packed: of a code, or of a plane of one."""

STORAGE_ERROR = 2.0**-25
"""Half of float16's smallest step: what storing the minimum of a group of tiny values may cost."""

FLOAT16_LAST = 65504.0
SMALLEST = 2.0**-100  # keeps a unit of zeros from dividing by zero

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits of the planes that a code of so many bits is cut into, the lowest bits first."""

POSITIVE_LEVELS = {
    2: (0.4527800346, 1.5104176085),
    3: (0.2450941789, 0.7560052813, 1.3439092785, 2.1519457045),
    4: (
        *(0.1283950299, 0.3880482995, 0.6567591185, 0.9423404565),
        *(1.2562311973, 1.6180463860, 2.0690172265, 2.7325895710),
    ),
    8: tuple(step + 0.5 for step in range(128)),
}
"""The levels of the upper half of the codes; those of the lower half mirror them."""


def smallest_scale(bits: int) -> float:
    """The scale of a constant group: fine enough to be harmless, coarse enough that float16 holds
    every scale from here on to well within half a step of the last code."""
    return 2.0 ** (bits - 24)


def quantize(
    x: Tensor, bits: int, dim: int, usable: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups that lie along one axis.

    Args:
        x: floating, any shape; everything along `dim` is one group.
        bits: 2, 4 or 8.
        dim: the axis that a group runs along.
        usable: bool, like `x`; False: the value has no say in its group's scale and minimum (it is
            padding, or kept elsewhere), and its code means nothing. None = all are usable.

    Returns:
        codes: uint8, like `x`.
        scale, minimum: float16, like `x` with length 1 along `dim`.

    Raises:
        ValueError: usable values are not finite, or beyond `LARGEST`.
    """
    x_dtype, x = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16, as_stored(x)
    low, high = _extremes(x, dim, usable)
    refuse_unstorable(torch.maximum(low.abs(), high.abs()))
    minimum = low.half()
    scale = _stable_scale(minimum.float(), high, bits, x_dtype)
    steps = (x - minimum.float()) / scale.float()
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8), scale, minimum


def dequantize(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """minimum + scale * code, float32.

    Args:
        codes: uint8.
        scale, minimum: float16, broadcast against `codes`.
    """
    return minimum.float() + scale.float() * codes.float()


def as_stored(x: Tensor) -> Tensor:
    """`x` in float32, rounded to what float16 holds."""
    return x.half().float() if x.dtype != torch.float16 else x.float()


def storable(x: Tensor) -> Tensor:
    """`x` in float32. Raises as `refuse_unstorable` does."""
    refuse_unstorable(x)
    return x.float()


def block_mean(x: Tensor) -> Tensor:
    """Mean of each channel over a block of units, [..., g, D] -> [..., 1, D].

    A block that has fewer units is filled up with its last one, which counts once.
    """
    own = _own_units(x)[..., None].to(x.dtype)
    return (x * own).sum(-2, keepdim=True) / own.sum(-2, keepdim=True)


def block_median(x: Tensor) -> Tensor:
    """Median of each channel over a block of units, otherwise as `block_mean`."""
    return x.masked_fill(~_own_units(x)[..., None], torch.nan).nanmedian(-2, keepdim=True).values


def _own_units(x: Tensor) -> Tensor:
    """bool [..., g]: not what fills up a block [..., g, D], its last unit again and again."""
    same = (x == x[..., -1:, :]).all(-1)
    own = same.flip(-1).int().cumprod(-1).flip(-1) == 0
    own[..., -1] = True
    return own


def refuse_unstorable(x: Tensor) -> None:
    """Refuse (ValueError) a value that is not finite, or beyond `LARGEST`."""
    refuse_where(~(x.abs() <= LARGEST).all())


def _stable_scale(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The scale of a group, taken twice: from its range, and from its range as restored."""
    last = 2**bits - 1
    for _ in range(2):
        scale = ((high - low) / last).clamp(min=smallest_scale(bits)).half()
        step = scale.float()
        high = (low + step * ((high - low) / step).round().clamp(0, last)).to(dtype).float()
    return scale


def _extremes(x: Tensor, dim: int, usable: Tensor | None) -> tuple[Tensor, Tensor]:
    if usable is None:
        return x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    low = x.masked_fill(~usable, torch.inf).amin(dim, keepdim=True)
    high = x.masked_fill(~usable, -torch.inf).amax(dim, keepdim=True)
    empty = ~usable.any(dim, keepdim=True)
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def hadamard(x: Tensor) -> Tensor:
    """H x, like `x` [..., D]: an orthonormal Walsh-Hadamard transform, its own inverse.

    A D that is no power of two is cut into blocks of the largest that divides it (80: five of 16).
    ValueError: D is odd.
    """
    size = x.shape[-1] & -x.shape[-1]
    if size < 2:
        raise ValueError(f"quantization 'rotated' needs an even head size; it is {x.shape[-1]}")
    y = x.float()
    step = 1
    while step < size:
        one, other = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack([one + other, one - other], -2).flatten(-3)
        step *= 2
    return (y * size**-0.5).to(x.dtype)


@lru_cache
def levels(bits: int, device: torch.device | None = None) -> Tensor:
    """float32 [2 ** bits], ascending: what a code stands for, before the scale."""
    upper = POSITIVE_LEVELS[bits]
    return torch.tensor([-level for level in reversed(upper)] + list(upper), device=device)


def encode_rotated(z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., d] and scale float16 [..., 1] of rotated units, float32 [..., D].
    ValueError: a scale is beyond float16."""
    level = levels(bits, z.device)
    if bits == 8:
        size = z.abs().amax(-1, keepdim=True) / level[-1]
    else:
        size = z.square().mean(-1, keepdim=True).sqrt()
    codes, scale = _nearest(z, size, level)
    codes, scale = _nearest(z, scale, level)  # a unit is not quite normal
    refuse_unstorable(scale * (LARGEST / FLOAT16_LAST))
    return pack_planes(codes.to(torch.uint8), bits), scale.half()


def _nearest(z: Tensor, size: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the levels nearest to z / size, and the scale of least error for them."""
    between = (level[1:] + level[:-1]) / 2
    codes = torch.bucketize(z / size.clamp(min=SMALLEST), between, out_int32=True)
    chosen = level[codes]
    return codes, (z * chosen).sum(-1, keepdim=True) / chosen.square().sum(-1, keepdim=True)


def decode_rotated(units: Sequence[Tensor], bits: int, head_size: int) -> Tensor:
    """scale * level[code], rotated units float32 [..., D], from what `encode_rotated`
    returned."""
    codes, scale = units
    return levels(bits, codes.device)[unpack_planes(codes, bits, head_size).int()] * scale.float()


def packed_size(size: int, bits: int) -> int:
    """Bytes that `size` codes of `bits` bits take."""
    return -(-size * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., size], each below 2 ** `bits`, as bytes uint8 [..., packed size]."""
    assert codes.dtype == torch.uint8, codes.dtype
    if not is_whole(bits, 1) or bits not in WIDTHS:
        raise ValueError(f"bits is {bits!r}; expected one of {', '.join(map(str, WIDTHS))}")
    if bits == 8:
        return codes
    room = packed_size(codes.shape[-1], bits)
    codes = pad(codes, (0, room * 8 // bits - codes.shape[-1])).unflatten(-1, (-1, room))
    packed = codes[..., 0, :].clone()
    for plane in range(1, 8 // bits):
        packed |= codes[..., plane, :] << (plane * bits)
    return packed


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """The codes [..., `size`] that `pack` was given."""
    assert packed.dtype == torch.uint8, packed.dtype
    assert packed.shape[-1] == packed_size(size, bits), (packed.shape, bits, size)
    if bits == 8:
        return packed
    planes = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(planes, -1)[..., :size]


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., D] as bytes [..., d], plane after plane."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(pack((codes >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes, -1) if len(planes) > 1 else planes[0]


def unpack_planes(packed: Tensor, bits: int, size: int) -> Tensor:
    """The codes [..., `size`] that `pack_planes` was given."""
    widths = PLANES[bits]
    planes = packed.split([packed_size(size, width) for width in widths], -1)
    codes, shift = unpack(planes[0], widths[0], size), widths[0]
    for plane, width in zip(planes[1:], widths[1:], strict=True):
        codes = codes | (unpack(plane, width, size) << shift)
        shift += width
    return codes


@dataclass(frozen=True)
class Outliers:
    """
    Attributes:
        counts: uint8 or int16 [N], outliers of each unit.
        channels: uint8 or int16 [O], in the order of units.
        values: float16 [O].
    """

    counts: Tensor
    channels: Tensor
    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.counts, self.channels, self.values

    @property
    def offsets(self) -> Tensor:
        """long [N]: where a unit's outliers begin."""
        counts = self.counts.long()
        return counts.cumsum(0) - counts

    def write(self, x: Tensor, unit: Tensor) -> None:
        """Put outliers back in place.

        Args:
            x: float32 [..., D], overwritten where a unit has an outlier.
            unit: long [...], below N.
        """
        unit = unit.flatten()
        counts = self.counts[unit].long()
        entries = ragged(self.offsets[unit], counts)
        of_unit, channels = torch.repeat_interleave(counts), self.channels[entries].long()
        x.view(-1, x.shape[-1])[of_unit, channels] = self.values[entries].float()

    def select(self, index: Tensor) -> "Outliers":
        """Those of the units at `index` [K] (long)."""
        counts = self.counts[index]
        entries = ragged(self.offsets[index], counts.long())
        return Outliers(counts, self.channels[entries], self.values[entries])

    @staticmethod
    def join(some: "Sequence[Outliers]") -> "Outliers":
        """Those of one after the other."""
        return Outliers(*map(torch.cat, zip(*(each.tensors for each in some), strict=True)))


def find_outliers(x: Tensor, large: Tensor) -> Outliers:
    """What `large` (bool [N, D]) says of `x` [N, D]. ValueError: a value is not finite, or beyond
    `LARGEST`."""
    x = as_stored(x)
    refuse_unstorable(x)
    small = torch.uint8 if x.shape[-1] < 256 else torch.int16
    channels = large.nonzero()[:, -1].to(small)
    return Outliers(large.sum(-1).to(small), channels, x[large].half())


def ragged(offsets: Tensor, counts: Tensor, total: int | None = None) -> Tensor:
    """offsets[i] .. offsets[i] + counts[i] - 1 of each i, one after the other; all long [n].
    `total` is the sum of `counts`, where it is known: then no device is waited for."""
    before = counts.cumsum(0) - counts
    shift = torch.repeat_interleave(offsets - before, counts, output_size=total)
    return shift + torch.arange(len(shift), device=shift.device)
