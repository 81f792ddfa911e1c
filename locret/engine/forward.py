"""How a chunk goes through all layers: with fused kernels between the model's own matrix products
where `locret.model.prenorm` knows them, else by the model's own forward."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.engine.attention import RetainedAttention
from locret.model.backbone import Backbone
from locret.model.hooks import as_argument
from locret.model.prenorm import Attend, PrenormDecoder, PrenormLayer, why_not_fused


class ChunkCounts(NamedTuple):
    """How the chunks of a prompt were read.

    Attributes:
        read: all of them.
        fused: those with fused kernels between matrix products.
    """

    read: int = 0
    fused: int = 0


@dataclass
class ChunkForward:
    """Reads chunks through an attached backbone.

    Attributes:
        attention: the layer function that the backbone is attached with.
        counts: of the last call of the engine.
    """

    backbone: Backbone
    attention: RetainedAttention
    counts: ChunkCounts = ChunkCounts()

    def __call__(self, ids: Tensor, cache: RetainedCache) -> None:
        """Read ids [B, T] into a cache, in its current pass.

        Raises:
            Stored: the last layer was done, and no caller wants its output.
        """
        fused, decoder = self.fuses, self.backbone.decoder
        self.counts = ChunkCounts(self.counts.read + 1, self.counts.fused + fused)
        if fused:
            hidden = PrenormDecoder(self.backbone).hidden(ids, self.attending(cache))
            self.attention.finish(cache, ids, hidden)
        else:
            decoder(input_ids=ids, use_cache=True, **as_argument(decoder, cache))

    @property
    def fuses(self) -> bool:
        """Whether fused kernels may stand in for the model's own forward now: hooks and adapters
        come and go, so it is asked for every chunk."""
        dtype = self.backbone.decoder.embed_tokens.weight.dtype
        return not torch.is_grad_enabled() and why_not_fused(self.backbone, dtype) is None

    def attending(self, cache: RetainedCache) -> Attend:
        """What stores and attends for one layer after the other."""

        def attend(i: int, x: Tensor, layer: PrenormLayer) -> Tensor:
            call = self.backbone.layers[i].call(x, layer.heads(x), layer.scaling, cache)
            return self.attention(call)

        return attend
