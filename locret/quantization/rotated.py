"""`rotated`: 2, 3, 4 or 8 bits an element, nearly lossless from 3 on.

A rotation by a Hadamard matrix H (orthonormal and its own inverse) spreads what is large in a few
channels over all of them, so that the elements of a rotated vector are nearly normal, and one table
of levels fits every model, layer and head.

Key:   z = H (x - mean), mean over its block, per channel, stored in bfloat16.
Value: z = H x.
Both:  z ~ zq = scale * level[code], with the code whose level is nearest to z / r.

- 2, 3, 4 bits: r = root mean square of z, and levels are those of Lloyd and Max for N(0, 1), which
  lose 11.7 %, 3.45 % and 0.95 % of the energy.
- 8 bits: r = max |z| / 127.5 and levels are code - 127.5. An even grid up to a unit's own largest
  element needs no table and loses about what the 256 levels of Lloyd and Max do: 0.82 of it at
  D = 64, 0.98 at 128, 1.15 at 256.
- scale = <z, level> / <level, level>, a float16 a unit: it makes <z, zq> = <zq, zq>, the least
  error that these codes allow, so that an inner product with zq is, on average, that with z. Codes
  are then chosen once more, with r = scale.

Nobody has to rotate a unit back: <q, x> = <H q, zq> + <q, mean>, and a weighted sum of values is
H (sum of weights * zq). `attend` shows both.

**Bytes.** A code is cut into planes of 1, 2, 4 or 8 bits, the lowest bits first (3 bits: a plane of
2, then one of 1); each is packed by `codes.pack`, and they follow each other in one uint8 tensor.
A scale takes 16 / D bits an element, a mean 16 / group: at D = 128 and group 64 b + 0.375 bits an
element of keys and b + 0.125 of values.

D head size, d packed size, S units, R queries. "..." is any shape.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from locret.kernels import (
    RotatedKV,
    expand_rotated,
    fetch_rotated,
    pack_rotated_keys,
    pack_rotated_values,
)
from locret.kernels.dispatch import takes_triton
from locret.quantization.base import Scheme, Tensors
from locret.quantization.codes import (
    LARGEST,
    block_mean,
    pack,
    packed_size,
    refuse_unstorable,
    refuse_where,
    storable,
    unpack,
)

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

DISTORTION = {2: 0.1174818478, 3: 0.0345477608, 4: 0.0095010080}
"""Mean square error of the levels of Lloyd and Max, of N(0, 1): `tests` derive both."""

FLOAT16_LAST = 65504.0
SMALLEST = 2.0**-100  # keeps a unit of zeros from dividing by zero


@dataclass(frozen=True)
class RotatedScheme(Scheme):
    """Of a key: codes uint8 [d], scale float16 [1] | mean bfloat16 [D] a block.
    Of a value: codes uint8 [d], scale float16 [1].

    Attributes:
        bits: a short form of both below; afterwards the larger of them.
        key_bits, value_bits: of a code: 2, 3, 4 or 8; 0 = `bits`.
    """

    name = "rotated"
    widths = tuple(PLANES)
    residual: int = 0  # so near to full precision, no unit is worth five of its size
    bits: int = 3
    key_bits: int = 0
    value_bits: int = 0

    def __post_init__(self) -> None:
        self._check_width("bits")
        for option in ("key_bits", "value_bits"):
            object.__setattr__(self, option, getattr(self, option) or self.bits)
            self._check_width(option)
        object.__setattr__(self, "bits", max(self.key_bits, self.value_bits))
        super().__post_init__()

    def encode_keys(self, x: Tensor, usable: Tensor | None) -> tuple[Tensors, Tensors]:
        x = storable(x)
        mean = block_mean(x).bfloat16()
        return encode(hadamard(x - mean.float()), self.key_bits), (mean.squeeze(-2),)

    def decode_keys(self, units: Tensors, tables: Tensors, head_size: int) -> Tensor:
        return hadamard(decode(units, self.key_bits, head_size)) + tables[0].float()

    def encode_values(self, x: Tensor, usable: Tensor | None) -> Tensors:
        return encode(hadamard(storable(x)), self.value_bits)

    def decode_values(self, units: Tensors, head_size: int) -> Tensor:
        return hadamard(decode(units, self.value_bits, head_size))

    def expand(
        self, packed: Tensors, starts: Tensor | None, out: Tensor, at: Tensor | None = None
    ) -> bool:
        bits = self.value_bits if starts is None else self.key_bits
        fused = self._fused(out)
        if fused:
            expand_rotated(packed, POSITIVE_LEVELS[bits], out, starts, at)
        return fused

    def keys_at(
        self,
        packed: Tensors | None,
        block: Tensor | None,
        fresh: Tensor,
        index: Tensor,
        kept: Tensor,
        starts: Tensor,
    ) -> tuple[Tensors, Tensors] | None:
        if not self._fused(fresh):
            return None
        levels = POSITIVE_LEVELS[self.key_bits]
        new, bad = pack_rotated_keys(packed, block, fresh, index, kept, starts, levels)
        refuse_where(bad)
        return new[:2], new[2:]

    def values_at(self, packed: Tensors | None, fresh: Tensor, index: Tensor) -> Tensors | None:
        if not self._fused(fresh):
            return None
        new, bad = pack_rotated_values(packed, fresh, index, POSITIVE_LEVELS[self.value_bits])
        refuse_where(bad)
        return new

    def units_at(
        self, packed: Tensors, block: Tensor | None, fresh: Tensor, index: Tensor
    ) -> Tensor | None:
        if not self._fused(fresh):
            return None
        bits = self.value_bits if block is None else self.key_bits
        return fetch_rotated(packed, block, fresh, index, POSITIVE_LEVELS[bits])

    def _fused(self, x: Tensor) -> bool:
        """Whether kernels read or write units [*, D] like `x`."""
        return takes_triton(x) and self.decodes_packed(x.shape[-1])

    def decodes_packed(self, head_size: int) -> bool:
        return head_size % 8 == 0

    def kernel_form(self, keys: Tensors, starts: Tensor, values: Tensors) -> RotatedKV:
        both = POSITIVE_LEVELS[self.key_bits], POSITIVE_LEVELS[self.value_bits]
        return RotatedKV(keys, starts, values, *both, self.group)


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


def encode(z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
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


def decode(units: Tensors, bits: int, head_size: int) -> Tensor:
    """scale * level[code], rotated units float32 [..., D], from what `encode` returned."""
    codes, scale = units
    return levels(bits, codes.device)[unpack_planes(codes, bits, head_size).int()] * scale.float()


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


def attend(
    scheme: RotatedScheme,
    query: Tensor,
    keys: Tensors,
    tables: Tensors,
    values: Tensors,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention over codes, no unit rotated back: the plain twin of kernels that do so.

    Args:
        query: floating [..., R, D].
        keys, values: what each unit needs, tensors [..., S, *].
        tables: each unit's entry of the key tables, tensors [..., S, *].

    Returns:
        Outputs float32 [..., R, D], and the logarithm of the sum of the weights' exponentials
        float32 [..., R], for a merge with attention over other units.
    """
    query, size = query.float(), query.shape[-1]
    turned = hadamard(query) @ decode(keys, scheme.key_bits, size).mT
    logits = (turned + query @ tables[0].float().mT) * scaling
    summed = logits.softmax(-1) @ decode(values, scheme.value_bits, size)
    return hadamard(summed), logits.logsumexp(-1)
