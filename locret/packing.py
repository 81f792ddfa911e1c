"""Plain causal attention over several conversations packed into one row (`locret.segments`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from locret.attention import Backend, LayerCall, attend
from locret.segments import Segment


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
        return torch.cat([self._attend(call, segment) for segment in self.segments], dim=1)

    def _attend(self, call: LayerCall, segment: Segment) -> Tensor:
        part = call.part(segment.start, segment.end)
        length = segment.end - segment.start
        query = part.rotate(part.query, 0, length)
        key = part.rotate(part.key, 0, length)
        return attend(query, key, part.value, part.scaling, self.backend)
