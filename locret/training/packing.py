"""Plain causal attention over several conversations packed into one row
(`locret.training.segments`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from locret.model.attend import Backend, attend
from locret.model.hooks import LayerCall
from locret.training.segments import Segment


class PackedAttention:
    """A layer function: every segment attends to itself, from slot 0 on; gradients flow.

    Args:
        segments: what stands in the row, in order, without gaps.
        backend: `eager` or `sdpa`.
    """

    def __init__(self, segments: Sequence[Segment], backend: Backend) -> None:
        self.segments = segments
        self.backend = backend

    def __call__(self, call: LayerCall) -> Tensor:
        lengths = [segment.end - segment.start for segment in self.segments]
        query = call.rotate_packed(call.query, lengths).split(lengths, dim=2)
        key = call.rotate_packed(call.key, lengths).split(lengths, dim=2)
        value = call.value.split(lengths, dim=2)
        return torch.cat(
            [
                attend(*qkv, call.scaling, self.backend)
                for qkv in zip(query, key, value, strict=True)
            ],
            dim=1,
        )
