"""Trunks read once, and their branches read again on what was kept of them.

A trunk sees no branch, so that its keys, values and scores are the same whatever happens to its
units afterwards. `Trunks` collects them while a row is read; `BranchAttention` is a row of the
branches' tokens alone, which see the collected units as they are told to.

B batch (1), H KV heads, G query heads a KV head, T tokens, P units of a trunk, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from locret.model.attend import Past, with_bias_in_channels
from locret.model.backends import Backend
from locret.model.hooks import LayerCall, without_autocast
from locret.model.varlen import Text, attend_texts
from locret.quantization import NO_SCHEME, Scheme
from locret.quantization.packed import pack_keys, pack_values
from locret.training.row_loss import Recipe, slots_of
from locret.training.segments import Segment, Span, Stretch


class Way(NamedTuple):
    """A branch in the row of branches.

    Attributes:
        segment: its trunk's, counted in the row.
        stretch: the branch in the row that it comes from.
        shift: from an offset in that row to one in the row of branches.
    """

    segment: int
    stretch: Stretch
    shift: int

    @property
    def own(self) -> Span:
        """Its tokens in the row of branches."""
        return self.stretch.start + self.shift, self.stretch.end + self.shift

    @property
    def asking(self) -> range:
        """Tokens of the row that it comes from which predict one of its answer, the branch's own
        alone: the trunk's last token predicts the same in both rows."""
        ((start, end),) = self.stretch.answers
        return range(max(start - 1, self.stretch.start), end - 1)


def ways_of(segments: Sequence[Segment]) -> list[Way]:
    """All branches of a row, one after the other."""
    ways, at = [], 0
    for number, segment in enumerate(segments):
        for stretch in segment.stretches[1:]:
            ways.append(Way(number, stretch, at - stretch.start))
            at += stretch.end - stretch.start
    return ways


@dataclass
class Trunks:
    """What the branches of a row see of its trunks.

    Args:
        recipe: its heads and their features.
        segments: the row's, all with branches.
        scheme: how keys and values are stored; they are as they come back from it.
        learning: scores get gradients.

    Attributes:
        units: for each layer, keys (rotated) and values [B, H, P of all trunks, D].
        scores: for each layer with heads, [H, P of all trunks] float32, higher = keep.
    """

    recipe: Recipe
    segments: Sequence[Segment]
    scheme: Scheme = NO_SCHEME
    learning: bool = True
    units: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """P of each trunk."""
        return [segment.last_prompt_end - segment.start for segment in self.segments]

    def add(self, call: LayerCall) -> None:
        """Collect a layer of the row."""
        key = self._of_trunks(call.rotate_ranges(call.key, slots_of(self.segments)), 2)
        value = self._of_trunks(call.value, 2)
        i = call.retained_idx
        if i is not None:
            key, value = stored(self.scheme.for_layer(i), key, value, self.lengths)
            features = self._of_trunks(self.recipe.features(call), 1)
            head = self.recipe.heads[i]
            with torch.set_grad_enabled(self.learning):
                # At least float32, whatever autocast makes of a head's products.
                scores = head(features)[0]
                self.scores[i] = scores.to(torch.promote_types(scores.dtype, torch.float32))
        self.units[call.layer_idx] = key, value

    def scores_of_segments(self) -> list[Tensor]:
        """[L, H, P] of each trunk."""
        together = torch.stack([self.scores[i] for i in sorted(self.scores)])
        return [*together.split(self.lengths, dim=-1)]

    def _of_trunks(self, x: Tensor, dim: int) -> Tensor:
        """A copy of the trunks' tokens: a view would keep the whole row in memory."""
        each = zip(self.segments, self.lengths, strict=True)
        return torch.cat([x.narrow(dim, segment.start, n) for segment, n in each], dim)


def stored(
    scheme: Scheme, key: Tensor, value: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Keys and values [1, H, T, D] of texts of these lengths as they come back from a scheme."""
    if not scheme.packs:
        return key, value
    heads, size = key.shape[1], key.shape[3]
    with without_autocast(key.device):
        sequences = [x for text in key[0].split(list(lengths), dim=1) for x in text]
        flat = torch.cat(sequences)
        of_heads = [length for length in lengths for _ in range(heads)]
        keys = pack_keys(scheme, flat, of_heads).dense(key.dtype).split(of_heads)
        by_text = [torch.stack(keys[i : i + heads]) for i in range(0, len(keys), heads)]
        values = pack_values(scheme, value.reshape(-1, size)).dense(value.dtype)
    return torch.cat(by_text, dim=1)[None], values.view(value.shape)


class BranchAttention:
    """A layer function for a row of branches: each sees its trunk, through gates, and itself.

    Args:
        ways: what stands in the row, in order, without gaps.
        trunks: what they see.
        gates: for each segment, logarithms of its gates [L, H, P]; None = all units are seen.
        backend: `eager` or `sdpa`.
    """

    def __init__(
        self, ways: Sequence[Way], trunks: Trunks, gates: Sequence[Tensor] | None, backend: Backend
    ) -> None:
        self.ways = ways
        self.trunks = trunks
        self.gates = None if gates is None else torch.cat(list(gates), dim=-1)
        self.backend = backend
        self.slots = [way.stretch.slots(way.stretch.start, way.stretch.end) for way in ways]

    def __call__(self, call: LayerCall) -> Tensor:
        query, key = (call.rotate_ranges(x, self.slots) for x in (call.query, call.key))
        past = Past(*self.trunks.units[call.layer_idx])
        if self.gates is not None and call.retained_idx is not None:
            past = past._replace(bias=self.gates[call.retained_idx][None])
        query, units, new = unbiased(query, past, (key, call.value), call.scaling)
        lengths = [way.stretch.end - way.stretch.start for way in self.ways]
        trunks = list(zip(*(x.split(self.trunks.lengths, dim=2) for x in units), strict=True))
        own = zip(*(x.split(lengths, dim=2) for x in new), strict=True)
        texts = [
            Text(length, *zip(trunks[way.segment], each, strict=True))
            for way, length, each in zip(self.ways, lengths, own, strict=True)
        ]
        output = attend_texts(query, texts, call.scaling, self.backend, call.weighting)
        return output[..., : call.query.shape[3]]


def unbiased(
    query: Tensor, past: Past, new: tuple[Tensor, Tensor], scaling: float
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Queries, past and new keys and values, with channels that carry the past's bias if it has
    one: any attention takes them, and gradients flow to the bias.

    Args: as of `locret.model.attend.with_bias_in_channels`, for one rectangle that is past.
    """
    if past.bias is None:
        return query, (past.keys, past.values), new
    query, (past,), fresh = with_bias_in_channels(query, [past], new, scaling)
    assert fresh is not None
    return query, (past.keys, past.values), fresh
