"""Features of the model as it evicts: what heads meet in use.

A forward of the whole row shows heads a model that sees all of its context. In use they score units
of a model that reads in chunks, with most of its context gone. So the engine reads each trunk here
as it does in use, with the heads as they are now, and what they read of every chunk is kept:
`Distillation` then compares their scores of it with the labels of the whole context.

In memory are the features of all layers and trunks of a row, 115 KB a token for Qwen2.5-Coder-1.5B
in 16 bits (28 layers of 2,048). The forward that takes the labels gives up a layer after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from locret.engine.engine import Engine
from locret.heads.heads import FEATURES, RetainingHeads
from locret.model.backbone import Backbone
from locret.policies import LocretPolicy
from locret.policies.base import LayerChunk
from locret.quantities import check_between, check_bounds
from locret.quantization import Quantization, scheme_of
from locret.training.row_loss import Features
from locret.training.segments import Segment


@dataclass(frozen=True)
class EvictedReading:
    """How trunks are read; what has bounds is drawn for each row, log-uniformly.

    Attributes:
        compressions: the least and the most tokens of a trunk for a unit kept, at least 1.
        chunk_sizes: the least and the most tokens read at a time.
        share: of the rows that are read so, 0 to 1; the others have features of the whole context.
        quantization: how the engine stores keys and values.

    Raises:
        ValueError: bounds in the wrong order or out of range, or no such quantization.
    """

    compressions: tuple[float, float] = (2.0, 16.0)
    chunk_sizes: tuple[int, int] = (512, 2048)
    share: float = 1.0
    quantization: Quantization = None

    def __post_init__(self) -> None:
        for name in ("compressions", "chunk_sizes"):
            check_bounds(f"evicted {name}", getattr(self, name), 1)
        check_between("evicted share", self.share, 0, 1)
        scheme_of(self.quantization)

    def drawn(self, rng: Random) -> tuple[float, int] | None:
        """Compression and chunk size of a row; None where features of the whole context do."""
        if rng.random() >= self.share:
            return None
        return self._between(rng.random(), rng.random())

    @property
    def middle(self) -> tuple[float, int]:
        """Compression and chunk size of validation."""
        return self._between(0.5, 0.5)

    def _between(self, *places: float) -> tuple[float, int]:
        """Compression and chunk size at these places, 0 to 1, between their bounds."""
        pairs = zip((self.compressions, self.chunk_sizes), places, strict=True)
        compression, chunk_size = (
            least * (most / least) ** place for (least, most), place in pairs
        )
        return compression, round(chunk_size)


class RecordingPolicy(LocretPolicy):
    """Scores with heads, and keeps what they read.

    Attributes:
        read: by layer, features [B, T, input width] of every chunk.
    """

    def __init__(self, heads: RetainingHeads) -> None:
        super().__init__(heads)
        self.read: Features = [[] for _ in heads.layers]

    def score(self, chunk: LayerChunk) -> Tensor:
        features = FEATURES[self.heads.config.tap](chunk)
        self.read[chunk.layer_idx].append(features)
        return self.heads[chunk.layer_idx](features)


def evicted_features(
    backbone: Backbone,
    heads: RetainingHeads,
    input_ids: Tensor,
    segments: Sequence[Segment],
    compression: float,
    chunk_size: int,
    quantization: Quantization = None,
) -> Features:
    """What heads read of each segment's labelled tokens while an engine reads and evicts them, with
    the quotas and the proportion of stabilizers that the heads record.

    Args:
        backbone: attached to nothing.
        heads: on the backbone's device.
        input_ids: [B, N] long, a row.
        segments: what stands in it.
        compression, chunk_size, quantization: see `EvictedReading`.
    """
    features: Features = [[] for _ in heads.layers]
    for segment in segments:
        trunk = input_ids[:, segment.start : segment.last_prompt_end]
        policy = RecordingPolicy(heads)
        engine = Engine(
            backbone.model,
            policy,
            budget=max(1, round(trunk.shape[1] / compression)),
            chunk_size=chunk_size,
            quantization=quantization,
        )
        engine.prefill(trunk, torch.ones_like(trunk))  # a pad_token_id in a text is no padding
        for of_layer, chunks in zip(features, policy.read, strict=True):
            of_layer.append(torch.cat(chunks, dim=1))
            chunks.clear()
    return features
