"""One-token steps near the bandwidth limit: fixed shapes, counters on the device, a CUDA graph.

While an answer is generated nothing moves any more: every step writes one unit behind those held
and attends to them. `StepPass` keeps the number of units held on the device, so that the same
kernel launches serve every step; `locret.engine.answering` records them once and replays them.

Python never reads the counters; it keeps its own, which move in step.

Between its matrix products a step of a model whose layers `locret.model.prenorm` knows runs fused
kernels.

Packed units that a kernel cannot attend to as they are (`Scheme.decodes_packed`) are written out at
every step, one layer after the other, to a scratch buffer that all layers share. What a cache
reports does not count it; it lives no longer than the answer. Nor does it count the rings of layers
with a sliding window (`locret.engine.rings`).
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.cache.context import StoredContext, places, sent
from locret.cache.layer import RetainedLayer
from locret.engine.attention import Pass
from locret.engine.rings import Rings
from locret.kernels import (
    PackedShares,
    Plain,
    RotatedKV,
    Shares,
    Tables,
    decode_packed,
    decode_sequences,
    decode_shares,
    packed_shares,
    store_rotated,
    store_units,
)
from locret.model.backbone import Backbone
from locret.model.hooks import LayerCall, without_autocast
from locret.model.prenorm import PrenormLayer
from locret.model.rotary import Rotary
from locret.model.weights import in_fp8_alone
from locret.quantization.packed import Expansion

_GROUPS = 9, torch.bfloat16
"""Major compute capability and dtype for which torch multiplies groups of matrices at once."""


class StepCounts(NamedTuple):
    """How the one-token steps of an answer ran.

    Attributes:
        taken: calls of the model with one token a row.
        fast: those of them with counters on the device.
        replayed: those of the fast ones that a CUDA graph ran.
        fused: those of the fast ones with fused kernels between matrix products.
        ahead: those of the replayed ones that ran before they were asked for.
    """

    taken: int
    fast: int = 0
    replayed: int = 0
    fused: int = 0
    ahead: int = 0


class Filling(NamedTuple):
    """Writes all keys, or all values, of a context to a scratch buffer, in the order of slots.

    Attributes:
        packed: of packed units.
        plain: the others, and the rows that they go to, long.
        out: flat [N, D].
    """

    packed: Expansion
    plain: tuple[Tensor, Tensor]
    out: Tensor

    def run(self) -> None:
        self.packed.write(self.out)
        units, at = self.plain
        self.out.index_copy_(0, at, units)


class StepContext(NamedTuple):
    """What the steps of one layer attend to beside its tail.

    Attributes:
        keys, values: units in full, flat [N, D].
        shares: which program attends to which of these.
        packed: packed units, as the kernel takes them; None = there are none.
        packed_shares: which program attends to which of these.
        fillings: what writes `keys` and `values` first, where they are in a scratch buffer.
    """

    keys: Tensor
    values: Tensor
    shares: Shares
    packed: Any = None
    packed_shares: PackedShares | None = None
    fillings: tuple[Filling, ...] = ()

    @classmethod
    def of(cls, layer: RetainedLayer, group: int, scratch: Tensor) -> "StepContext":
        """A layer's context, of no units where there is none.

        Args:
            group: query heads of a KV head.
            scratch: as `scratch_for` makes it.
        """
        context, tail = layer.store.context, layer.store.tail
        if context is None:
            rows, heads, _, size = tail.tensors[0].shape
            none = tail.tensors[0].new_empty(0, size)
            return cls(none, none, decode_shares([0] * (rows * heads), none.device))
        if writes_out(layer):
            return cls.written_out(context, scratch)
        shares = decode_shares(context.plain.flat, context.keys.device)
        keys, values = context.packed_keys, context.packed_values
        if keys is None or values is None:
            return cls(context.keys, context.values, shares)
        of_keys = (*keys.units, *keys.tables)
        packed = layer.store.scheme.kernel_form(of_keys, keys.starts, values.units)
        of_packed = packed_shares(packed, context.packed.flat, group, context.keys.dtype)
        return cls(context.keys, context.values, shares, packed, of_packed)

    @classmethod
    def written_out(cls, context: StoredContext, scratch: Tensor) -> "StepContext":
        """Packed units expanded, the others behind them."""
        whole = context.sequences
        first, last = places(whole, context.packed, False), places(whole, context.plain, True)
        both = (context.packed_keys, context.keys), (context.packed_values, context.values)
        fillings = tuple(
            Filling(Expansion(packed, first), (plain, last), out[: whole.total])
            for (packed, plain), out in zip(both, scratch, strict=True)
            if packed is not None
        )
        shares = decode_shares(whole.flat, scratch.device)
        keys, values = (filling.out for filling in fillings)
        return cls(keys, values, shares, fillings=fillings)

    def turned_for(self, query: Tensor) -> Tensor | None:
        """Room for H q of a query, if the kernel takes that too."""
        if not isinstance(self.packed, RotatedKV):
            return None
        return torch.empty(query.shape, dtype=torch.float32, device=query.device)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        length: Tensor,
        scaling: float,
        turned_query: Tensor | None = None,
    ) -> Tensor:
        """[B, H*G, 1, D], over the context and the first `length` units of the tail."""
        for filling in self.fillings:
            filling.run()
        plain = Plain(self.keys, self.values, self.shares, keys, values, length)
        if self.packed is None:
            return decode_sequences(query, plain, scaling)
        assert self.packed_shares is not None
        of_packed = self.packed, self.packed_shares
        return decode_packed(query, *of_packed, plain, scaling, turned_query)


class StepPass(Pass):
    """One-token attention with counters on the device.

    Args:
        backbone: attached.
        cache: a cache whose prompt is read. Its storage must not move while this lives.
        room: steps to make storage for.
    """

    def __init__(self, backbone: Backbone, cache: RetainedCache, room: int) -> None:
        self.cache = cache
        self._rotary = backbone.rotary
        self._rotates = [layer.rotary is not None for layer in backbone.layers]
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self._signed: dict[int, tuple[Tensor, Tensor]] = {}
        self._now: dict[int, tuple[Tensor, Tensor]] = {}
        device = cache.layers[0].store.like.device
        positions = sent(cache.shifted(cache.seen), device, torch.int32)
        # Layers with a window hold theirs in rings until the last step.
        for layer in cache.retained_layers:
            layer.store.make_room(room, positions)
        tails = [layer.store.tail for layer in cache.retained_layers]
        self._end = cache.seen + min((x.capacity - x.count for x in tails), default=room)
        counts = [layer.store.tail.count for layer in cache.layers]
        self._filled = torch.tensor(counts, dtype=torch.int32, device=device)
        self._lengths = self._filled + 1
        self._starts = [self._start_of(layer) for layer in cache.layers]
        self._places: dict[int, list[tuple[int, ...]]] = {}
        whole = [layer.window is None for layer in cache.layers]
        for count, starts in dict.fromkeys(itertools.compress(self._starts, whole)):
            self._places.setdefault(count, []).append(starts)
        group = backbone.geometry.num_query_heads // backbone.geometry.num_kv_heads
        scratch = scratch_for(cache)
        self._contexts = [
            None if layer.window is not None else StepContext.of(layer, group, scratch)
            for layer in cache.layers
        ]
        self._rings = Rings(backbone, cache, self.left) if any(backbone.windows) else None
        self._like = torch.empty(0, dtype=cache.layers[0].store.like.dtype, device=device)

    @property
    def left(self) -> int:
        """Steps for which there is storage still."""
        return self._end - self.cache.seen

    def _start_of(self, layer: RetainedLayer) -> tuple[int, tuple[int, ...]]:
        """Units in the tail, and the slot of the first of them in each row."""
        count = layer.store.tail.count
        if self.cache.positions == "original":
            return count, self.cache.shifted(layer.seen - count)
        return count, layer.first_tail_slots()

    def rotation(
        self, layer_idx: int, hidden: Tensor, cache: RetainedCache, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [1 or B, 1, rotary size] at a layer's next slot."""
        count, starts = self._starts[layer_idx]
        if count not in self._now:
            slot = self._filled[layer_idx : layer_idx + 1]
            cos, sin = (table.index_select(2, slot) for table in self._tables_for(count))
            self._now[count] = cos, sin
        cos, sin = self._now[count]
        which = self._places[count].index(starts)
        return cos[which], sin[which]

    def _tables_for(self, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin [n, 1 or B, C, R] for the slots of the tail, C of them, from each of the n
        places on where it begins in layers with so many units in it: one look-up serves all."""
        if count not in self._tables:
            tails = (layer.store.tail for layer in self.cache.layers)
            capacity, lengths = max(tail.capacity for tail in tails), self.cache.prompt_lengths
            each = [
                self._rotary.cos_sin(starts, capacity, lengths, self._like)
                for starts in self._places[count]
            ]
            rows = max(len(cos) for cos, _ in each)
            cos, sin = (
                torch.stack([table.expand(rows, -1, -1) for table in tables])
                for tables in zip(*each, strict=True)
            )
            self._tables[count] = cos, sin
        return self._tables[count]

    def _turning(self, layer_idx: int) -> Tables | None:
        """What `store_rotated` rotates a layer's new unit with; None for a layer without RoPE."""
        if not self._rotates[layer_idx]:
            return None
        count, starts = self._starts[layer_idx]
        if count not in self._signed:
            assert self._rotary.pattern is not None
            self._signed[count] = self._rotary.pattern.tables(*self._tables_for(count))
        cos, sin = self._signed[count]
        which = self._places[count].index(starts)
        return Tables(cos[which], sin[which])

    def attend(self, call: LayerCall, layer: RetainedLayer, wanted: bool) -> Tensor:
        with without_autocast(call.key.device):
            return self._attend(call, layer)

    def _attend(self, call: LayerCall, layer: RetainedLayer) -> Tensor:
        """Store the new unit and attend, [B, 1, H*G, D]."""
        i, tail, context = call.layer_idx, layer.store.tail, self._contexts[call.layer_idx]
        assert context is not None
        self.cache.answered = self.cache.budget is not None
        keys, values = tail.tensors[:2]
        store_units(keys, values, call.key, call.value, self._filled[i : i + 1])
        length = self._lengths[i : i + 1]
        output = context.attend(call.query, keys, values, length, call.scaling)
        tail.count += 1
        return output.transpose(1, 2)

    def slide(
        self, call: LayerCall, layer: RetainedLayer, window: int, backend: Any, wanted: bool
    ) -> Tensor:
        """The same in a layer with a window, in its ring."""
        assert self._rings is not None
        return self._rings.attend(call).transpose(1, 2)

    def take(self, i: int, x: Tensor, layer: PrenormLayer) -> Tensor:
        """Store the new unit that a layer makes of x [B, 1, hidden size], and attend,
        [B, 1, H*G, D]. Python's counters stay: `advance`."""
        keys, values = self.cache.layers[i].store.tail.tensors[:2]
        slot, length = (counts[i : i + 1] for counts in (self._filled, self._lengths))
        new, norms, context = layer.project(x), layer.head_norms, self._contexts[i]
        assert context is not None
        turned = context.turned_for(new.query)
        query = store_rotated(new, keys, values, slot, self._turning(i), norms, turned)
        output = context.attend(query, keys, values, length, layer.scaling, turned)
        return output.transpose(1, 2)

    def end(self) -> None:
        """After the layers of a step ran: move the device's counters."""
        self._filled += 1
        self._lengths += 1
        self._now = {}
        if self._rings is not None:
            self._rings.move(1)

    def rewind(self) -> None:
        """Take the device's counters back by one step."""
        self._filled -= 1
        self._lengths -= 1
        if self._rings is not None:
            self._rings.move(-1)

    def close(self) -> None:
        """After the last step: what is in rings goes back to its layers."""
        if self._rings is not None:
            self._rings.close()

    def advance(self) -> None:
        """Python's counters, after a replay or a fused step."""
        self.cache.answered = self.cache.budget is not None
        for layer in self.cache.layers:
            layer.store.tail.count += layer.window is None
            layer.seen += 1


def takes_steps(layer: RetainedLayer, folds: bool) -> bool:
    """Whether one-token steps of a layer can write in place and attend to all: nothing comes back
    from the host, and what is packed can be read, or written out, without waiting for the device.

    Args:
        folds: units count for what was folded into them, which the kernels of steps do not know.
    """
    if layer.host is not None or layer.is_empty or folds:
        return False
    if layer.window is not None:  # a ring is filled alike in all rows, by units in full
        return layer.store.sequences.equal and not layer.store.scheme.packs
    scheme, size = layer.store.scheme, layer.store.like.shape[-1]
    return not scheme.packs or scheme.decodes_packed(size) or scheme.recordable


def writes_out(layer: RetainedLayer) -> bool:
    """Whether steps write out a layer's packed units before they attend."""
    context = layer.store.context
    if context is None or context.packed_keys is None:
        return False
    return not layer.store.scheme.decodes_packed(context.keys.shape[1])


def scratch_for(cache: RetainedCache) -> Tensor:
    """Room for the keys and the values of any layer that `writes_out`, [2, N, D]."""
    some = [layer.store.context for layer in cache.layers if writes_out(layer)]
    most = max((context.sequences.total for context in some if context is not None), default=0)
    like = cache.layers[0].store.like
    return like.new_empty(2, most, like.shape[-1])


def why_not_graphed(backbone: Backbone) -> str | None:
    """Why the model's steps cannot be recorded as a CUDA graph; None if they can."""
    model, config = backbone.model, backbone.config
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if len(set(map(str, getattr(model, "hf_device_map", {}).values()))) > 1:
        return "the model is spread over several devices"
    if not backbone.takes_steps:
        return "the model has softcaps, sinks, or retained layers with more than one RoPE"
    # torchao's products in FP8 are computed on the device alone, scales included.
    if getattr(model, "hf_quantizer", None) is not None and not in_fp8_alone(model):
        return "the model's weights are quantized"
    if any(getattr(config, name, 0) for name in ("num_local_experts", "num_experts")):
        return _why_experts_wait(model)
    return None


def _why_experts_wait(model: Any) -> str | None:
    """Why the host waits to know which of a mixture's experts were chosen; None if it does not."""
    how, device = getattr(model.config, "_experts_implementation", None), model.device
    capability = torch.cuda.get_device_capability(device)[0]
    # Groups of other matrices, or on other GPUs, torch multiplies one after the other.
    if how == "batched_mm" or how == "grouped_mm" and (capability, model.dtype) == _GROUPS:
        return None
    return (
        f"its experts run by experts_implementation={how!r} in {model.dtype} on a GPU of compute "
        f"capability {capability}, which waits for the host; 'grouped_mm' in bfloat16 on Hopper, "
        "and 'batched_mm', do not"
    )
