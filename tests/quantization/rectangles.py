"""Equal sequences as rectangles [B, H, S, D], and what a layer does with them between evictions."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from locret.quantization.packed import (
    Packed,
    fetch,
    pack_keys,
    pack_values,
    select_keys,
    select_values,
)


@dataclass
class Rectangle:
    """What is packed of sequences [B, H] that are equally long, in equal blocks."""

    packed: Packed
    shape: tuple[int, int]

    @property
    def tensors(self):
        return self.packed.tensors

    @property
    def outliers(self):
        return self.packed.outliers

    @property
    def count(self):
        """Units of a sequence."""
        return self.packed.count // (self.shape[0] * self.shape[1])

    @property
    def units(self):
        """Tensors [B, H, P, *]."""
        return self._rectangular(self.packed.units)

    @property
    def tables(self):
        """Tensors [B, H, G, *]."""
        return self._rectangular(self.packed.tables)

    @property
    def starts(self):
        """[B, H, G + 1], counted in each sequence."""
        sizes = self._rectangular((self.packed.starts.diff(),))[0]
        return pad(sizes.cumsum(-1), (1, 0))

    def dequantize(self, dtype):
        """[B, H, P, D]."""
        return self._rectangular((self.packed.dense(dtype),))[0]

    def _rectangular(self, tensors):
        count = self.shape[0] * self.shape[1]
        return tuple(x.view(*self.shape, len(x) // count, *x.shape[1:]) for x in tensors)


def quantize_keys(scheme, x):
    lengths = [x.shape[2]] * (x.shape[0] * x.shape[1])
    return Rectangle(pack_keys(scheme, x.flatten(0, 2), lengths), x.shape[:2])


def quantize_values(scheme, x):
    return Rectangle(pack_values(scheme, x.flatten(0, 2)), x.shape[:2])


class Layer:
    """Sequences of one layer: the first `packed` units of each packed, the others as they came."""

    def __init__(self, scheme):
        self.scheme, self.packed, self.keys, self.values = scheme, 0, None, None
        self.plain = ()

    @property
    def count(self):
        return self.packed + (self.plain[0].shape[2] if self.plain else 0)

    @property
    def nbytes(self):
        packed = self.keys.nbytes + self.values.nbytes if self.packed else 0
        return packed + sum(x.nbytes for x in self.plain)

    def append(self, keys, values):
        new = (keys, values)
        self.plain = (
            tuple(torch.cat(pair, 2) for pair in zip(self.plain, new, strict=True))
            if self.plain
            else new
        )

    def select(self, index):
        """Hold the units at `index` [B, H, K] and pack them, but for the last of them."""
        (batch, heads, plain, _), flat = self.plain[0].shape, [x.flatten(0, 2) for x in self.plain]
        sequence = torch.arange(batch * heads).view(batch, heads, 1)
        fresh = batch * heads * self.packed + sequence * plain + index - self.packed
        index = torch.where(index < self.packed, sequence * self.packed + index, fresh)
        kept = index.shape[2] - min(self.scheme.residual, index.shape[2])
        last, index = index[:, :, kept:], index[:, :, :kept].flatten()
        was, now = ([count] * batch * heads for count in (self.packed, kept))
        packed = (self.keys, self.values) if self.packed else (None, None)
        self.plain = tuple(
            fetch(old, new, last).to(new.dtype) for old, new in zip(packed, flat, strict=True)
        )
        self.keys = select_keys(self.scheme, packed[0], was, flat[0], index, now)
        self.values = select_values(self.scheme, packed[1], flat[1], index)
        self.packed = kept

    def dense(self, dtype=None):
        """Keys and values [B, H, S, D]."""
        dtype = dtype or self.plain[0].dtype
        plain = tuple(x.to(dtype) for x in self.plain)
        if not self.packed:
            return plain
        packed = (Rectangle(x, plain[0].shape[:2]) for x in (self.keys, self.values))
        return tuple(
            torch.cat([old.dequantize(dtype), new], 2)
            for old, new in zip(packed, plain, strict=True)
        )
