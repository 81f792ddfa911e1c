"""The windows of sliding layers while one-token steps run: rings on the device.

A layer with a sliding window attends to its last tokens. Their rotation is in the keys and the
softmax does not ask for their order, so that they may lie in memory in any: each step writes its
token over the one that leaves the window, at a slot that only the device knows. Keys are there a
second time, unrotated: these go back to the layer, whose storage stays as it is until then.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.cache.context import sent
from locret.cache.layer import RetainedLayer
from locret.cache.store import NewTokens
from locret.engine.attention import keep_window
from locret.kernels import Plain, decode_sequences, decode_shares, store_units
from locret.model.backbone import Backbone
from locret.model.hooks import AttentionLayer, LayerCall


class Ring(NamedTuple):
    """The last tokens of one layer.

    Attributes:
        keys, values: [B, H, C, D], C at most the window; keys rotated.
        unrotated: the keys before; the same tensor for a layer without RoPE.
        tables: cos and sin [1 or B, n, R] for the tokens that come; None for a layer without RoPE.
    """

    keys: Tensor
    values: Tensor
    unrotated: Tensor
    tables: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls, attention: AttentionLayer, layer: RetainedLayer, lengths: tuple[int, ...], room: int
    ) -> "Ring":
        """What a layer holds, and room for so many tokens more or for its window."""
        assert attention.window is not None and layer.store.sequences.equal
        count, rotary = layer.longest, attention.rotary
        capacity = min(attention.window, count + room)
        unrotated, slots = layer.keys, torch.arange(count, device=layer.keys.device)[-capacity:]

        def ring(units: Tensor) -> Tensor:
            made = units.new_empty(*units.shape[:2], capacity, units.shape[3])
            made[:, :, slots % capacity] = units[:, :, slots]
            return made

        values, before = ring(layer.values), ring(unrotated)
        if rotary is None:
            return cls(before, values, before, None)
        keys = rotary.rotate(unrotated, (0,), lengths)
        return cls(ring(keys), values, before, rotary.cos_sin((count,), room, lengths, keys))

    def last(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Unrotated keys, and values, of units first .. first + count - 1, as far as they are in
        the ring still."""
        capacity = self.values.shape[2]
        slots = torch.arange(first, first + count, device=self.values.device)[-capacity:] % capacity
        return self.unrotated[:, :, slots], self.values[:, :, slots]


class Rings:
    """Those of all layers with a window.

    Args:
        backbone: attached.
        cache: a cache whose prompt is read; in each of these layers all rows hold equally many
            units.
        room: tokens that may come.
    """

    def __init__(self, backbone: Backbone, cache: RetainedCache, room: int) -> None:
        layers = [layer for layer in backbone.layers if layer.window is not None]
        whole, lengths = [cache.layers[layer.layer_idx] for layer in layers], cache.prompt_lengths
        self._cache, self._layers, self._seen = cache, whole, cache.seen
        self._rings = [
            Ring.of(layer, units, lengths, room) for layer, units in zip(layers, whole, strict=True)
        ]
        self._number = {layer.layer_idx: number for number, layer in enumerate(layers)}
        like = self._rings[0].keys
        capacities = [ring.keys.shape[2] for ring in self._rings]
        self._first = sent([layer.longest for layer in whole], like.device, torch.int32)
        self._capacities = sent(capacities, like.device, torch.int32)
        self._taken = sent([0], like.device, torch.int32)
        self._slots, self._lengths = self._first.long(), torch.empty_like(self._first)
        self._shares = decode_shares([0] * (like.shape[0] * like.shape[1]), like.device)
        self._none = like.new_empty(0, like.shape[3])
        self.move(0)

    def move(self, steps: int) -> None:
        """Set the device's counters forward or back."""
        self._taken += steps
        before = self._first + self._taken
        torch.remainder(before, self._capacities, out=self._slots)
        torch.minimum(before + 1, self._capacities, out=self._lengths)

    def attend(self, call: LayerCall) -> Tensor:
        """Write a layer's new token to its ring, and attend to all there: [B, H*G, 1, D]."""
        number = self._number[call.layer_idx]
        ring, query, key = self._rings[number], call.query, call.key
        slot, length = (counts[number : number + 1] for counts in (self._slots, self._lengths))
        if ring.tables is not None:
            assert call.rotary is not None
            ring.unrotated.index_copy_(2, slot, key)
            cos, sin = (table.index_select(1, self._taken) for table in ring.tables)
            query, key = (call.rotary.turn(x, cos, sin) for x in (query, key))
        store_units(ring.keys, ring.values, key, call.value, slot)
        units = Plain(self._none, self._none, self._shares, ring.keys, ring.values, length)
        return decode_sequences(query, units, call.scaling)

    def close(self) -> None:
        """After the last step: let the layers hold what is left of their windows."""
        for layer, ring in zip(self._layers, self._rings, strict=True):
            assert layer.window is not None
            keys, values = ring.last(layer.longest, layer.seen - self._seen)
            starts = sent(self._cache.shifted(layer.seen - keys.shape[2]), keys.device)
            positions = starts[:, None, None] + torch.arange(keys.shape[2], device=keys.device)
            keep_window(layer, layer.window, NewTokens.of(keys, values, positions))
