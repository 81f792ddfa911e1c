"""The windows of sliding layers while one-token steps run: rings on the device.

A layer with a sliding window attends to its last tokens. Their rotation is in the keys and the
softmax does not ask for their order, so that they may lie in memory in any: each step writes its
token over the one that leaves the window, at a slot that only the device knows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.cache.context import sent
from locret.cache.layer import RetainedLayer
from locret.kernels import Plain, decode_sequences, decode_shares, store_units
from locret.model.backbone import Backbone
from locret.model.hooks import AttentionLayer, LayerCall


class Ring(NamedTuple):
    """The last tokens of one layer.

    Attributes:
        keys, values: [B, H, C, D], C at most the window; keys rotated.
        tables: cos and sin [1 or B, n, R] for the tokens that come; None for a layer without RoPE.
    """

    keys: Tensor
    values: Tensor
    tables: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls, attention: AttentionLayer, layer: RetainedLayer, lengths: tuple[int, ...], room: int
    ) -> "Ring":
        """What a layer holds, and room for so many tokens more or for its window."""
        assert attention.window is not None and layer.store.sequences.equal
        count, rotary = layer.longest, attention.rotary
        capacity = min(attention.window, count + room)
        tables, keys, values = None, layer.keys, layer.values
        if rotary is not None:
            keys = rotary.rotate(keys, (0,), lengths)
            tables = rotary.cos_sin((count,), room, lengths, keys)
        rooms = [x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (keys, values)]
        ring = cls(rooms[0], rooms[1], tables)
        slots = torch.arange(count, device=keys.device)[-capacity:]
        for whole, units in ((ring.keys, keys), (ring.values, values)):
            whole[:, :, slots % capacity] = units[:, :, slots]
        return ring


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
        self._rings = [
            Ring.of(layer, units, lengths, room) for layer, units in zip(layers, whole, strict=True)
        ]
        self._number = {layer.layer_idx: number for number, layer in enumerate(layers)}
        like = self._rings[0].keys
        capacities = [ring.keys.shape[2] for ring in self._rings]
        self._first = sent([layer.longest for layer in whole], like.device, torch.int32)
        self._capacities = sent(capacities, like.device, torch.int32)
        self._taken = sent([0], like.device, torch.int32)
        self._slots, self._lengths = torch.empty_like(self._first), torch.empty_like(self._first)
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
        if ring.tables is not None:
            assert call.rotary is not None
            cos, sin = (table.index_select(1, self._taken) for table in ring.tables)
            query, key = (call.rotary.turn(x, cos, sin) for x in (query, key))
        slot, length = (counts[number : number + 1] for counts in (self._slots, self._lengths))
        store_units(ring.keys, ring.values, key, call.value, slot)
        units = Plain(self._none, self._none, self._shares, ring.keys, ring.values, length)
        return decode_sequences(query, units, call.scaling)
