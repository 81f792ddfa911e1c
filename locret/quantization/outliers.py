"""Values too large for a group, kept as they are: the sparse half of dense-and-sparse storage.

KVQuant (arXiv 2401.18079, section 3.4) keeps outliers apart so that they do not stretch the steps
of all others. Here they are a row per unit: how many, and their channels and values.

B batch, H KV heads, P units, D head size, N outliers in all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from locret.quantization.affine import as_stored, refuse_unstorable


@dataclass(frozen=True)
class Outliers:
    """
    Attributes:
        counts: uint8 or int16 [B, H, P], outliers of each unit.
        channels: uint8 or int16 [N], in the order of heads and units.
        values: float16 [N].
    """

    counts: Tensor
    channels: Tensor
    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.counts, self.channels, self.values

    @property
    def offsets(self) -> Tensor:
        """long [B, H, P]: where a unit's outliers begin."""
        counts = self.counts.long().flatten()
        return (counts.cumsum(0) - counts).view(self.counts.shape)

    def write(self, x: Tensor, unit: Tensor) -> None:
        """Put outliers back in place.

        Args:
            x: float32 [..., D], overwritten where a unit has an outlier.
            unit: long [...], of the flattened B * H * P units.
        """
        counts = self.counts.flatten()[unit].long().flatten()
        entries = _ragged(self.offsets.flatten()[unit].flatten(), counts)
        rows = torch.repeat_interleave(counts)
        x.view(-1, x.shape[-1])[rows, self.channels[entries].long()] = self.values[entries].float()

    def select(self, index: Tensor) -> "Outliers":
        """Those of the units at `index` [B, H, K]."""
        return self._of(self.counts.gather(2, index), self.offsets.gather(2, index))

    def select_batch(self, rows: Tensor) -> "Outliers":
        """Those of the batch rows `rows` [B']."""
        return self._of(self.counts[rows], self.offsets[rows])

    def join(self, other: "Outliers") -> "Outliers":
        """Those of these units, followed in each head by those of `other`."""
        pool = Outliers(
            torch.cat([self.counts, other.counts], 2),
            torch.cat([self.channels, other.channels]),
            torch.cat([self.values, other.values]),
        )
        offsets = torch.cat([self.offsets, other.offsets + len(self.values)], 2)
        return pool._of(pool.counts, offsets)

    def _of(self, counts: Tensor, offsets: Tensor) -> "Outliers":
        entries = _ragged(offsets.flatten(), counts.flatten().long())
        return Outliers(counts, self.channels[entries], self.values[entries])


def find_outliers(x: Tensor, limit: float) -> Outliers:
    """What is larger than `limit` in `x` [B, H, P, D].

    Raises:
        ValueError: a value is not finite, or beyond `affine.LARGEST`.
    """
    x = as_stored(x)
    refuse_unstorable(x)
    large = x.abs() > limit
    small = torch.uint8 if x.shape[-1] < 256 else torch.int16
    channels = large.nonzero()[:, -1].to(small)
    return Outliers(large.sum(-1).to(small), channels, x[large].half())


def _ragged(offsets: Tensor, counts: Tensor) -> Tensor:
    """offsets[i] .. offsets[i] + counts[i] - 1 of each i, one after the other; all long [n]."""
    before = counts.cumsum(0) - counts
    shift = torch.repeat_interleave(offsets - before, counts)
    return shift + torch.arange(len(shift), device=shift.device)
