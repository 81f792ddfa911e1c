"""One-token steps near the bandwidth limit: fixed shapes, counters on the device, a CUDA graph.

While an answer is generated nothing moves any more: every step writes one unit behind those held
and attends to them. `StepPass` keeps the number of units held on the device, so that the same
kernel launches serve every step; `GraphedSteps` records them once and replays them.

Python never reads the counters; it keeps its own, which move in step.

Between its matrix products a step of a model whose layers `locret.model.prenorm` knows runs fused
kernels.

Packed units that a kernel cannot attend to as they are (`Scheme.decodes_packed`) are written out at
every step, one layer after the other, to a scratch buffer that all layers share. What a cache
reports does not count it; it lives no longer than the answer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.cache.context import StoredContext, places
from locret.cache.layer import RetainedLayer
from locret.engine.ahead import StepsAhead, likeliest
from locret.engine.forward import ChunkForward, asks_logits
from locret.engine.graphs import record
from locret.engine.passes import Pass
from locret.kernels import (
    PackedShares,
    Plain,
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
from locret.model.hooks import LayerCall, as_argument, as_output, without_autocast
from locret.model.prenorm import PrenormDecoder, PrenormLayer, why_not_fused
from locret.model.rotary import Rotary
from locret.quantization.packed import Expansion

EAGER_STEPS = 2  # steps before the graph is recorded: they compile kernels and make workspaces


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

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, length: Tensor, scaling: float
    ) -> Tensor:
        """[B, H*G, 1, D], over the context and the first `length` units of the tail."""
        for filling in self.fillings:
            filling.run()
        plain = Plain(self.keys, self.values, self.shares, keys, values, length)
        if self.packed is None:
            return decode_sequences(query, plain, scaling)
        assert self.packed_shares is not None
        return decode_packed(query, self.packed, self.packed_shares, plain, scaling)


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
        for layer in cache.layers:
            layer.store.make_room(room, layer.seen)
        counts = [layer.store.tail.count for layer in cache.layers]
        self._filled = torch.tensor(counts, dtype=torch.int32, device=device)
        self._lengths = self._filled + 1
        self._starts = [self._start_of(layer) for layer in cache.layers]
        self._places: dict[int, list[tuple[int, ...]]] = {}
        for count, starts in dict.fromkeys(self._starts):
            self._places.setdefault(count, []).append(starts)
        group = backbone.geometry.num_query_heads // backbone.geometry.num_kv_heads
        scratch = scratch_for(cache)
        self._contexts = [StepContext.of(layer, group, scratch) for layer in cache.layers]
        self._like = torch.empty(0, dtype=cache.layers[0].store.like.dtype, device=device)

    @property
    def left(self) -> int:
        """Steps for which there is storage still."""
        tails = (layer.store.tail for layer in self.cache.layers)
        return min(tail.capacity - tail.count for tail in tails)

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
        i, tail = call.layer_idx, layer.store.tail
        self.cache.answered = self.cache.budget is not None
        keys, values = tail.tensors[:2]
        store_units(keys, values, call.key, call.value, self._filled[i : i + 1])
        length = self._lengths[i : i + 1]
        output = self._contexts[i].attend(call.query, keys, values, length, call.scaling)
        tail.count += 1
        return output.transpose(1, 2)

    def take(self, i: int, x: Tensor, layer: PrenormLayer) -> Tensor:
        """Store the new unit that a layer makes of x [B, 1, hidden size], and attend,
        [B, 1, H*G, D]. Python's counters stay: `advance`."""
        keys, values = self.cache.layers[i].store.tail.tensors[:2]
        slot, length = (counts[i : i + 1] for counts in (self._filled, self._lengths))
        new, norms = layer.project(x), layer.head_norms
        query = store_rotated(new, keys, values, slot, self._turning(i), norms)
        output = self._contexts[i].attend(query, keys, values, length, layer.scaling)
        return output.transpose(1, 2)

    def end(self) -> None:
        """After the layers of a step ran: move the device's counters."""
        self._filled += 1
        self._lengths += 1
        self._now = {}

    def rewind(self) -> None:
        """Take the device's counters back by one step."""
        self._filled -= 1
        self._lengths -= 1

    def advance(self) -> None:
        """Python's counters, after a replay or a fused step."""
        self.cache.answered = self.cache.budget is not None
        for layer in self.cache.layers:
            layer.store.tail.count += 1
            layer.seen += 1


class GraphedSteps:
    """Runs a model's one-token steps from a CUDA graph.

    Args:
        forward: reads what is no step, through the attached backbone.
        cache: of the request; its prompt is read by calls that this object declines.
        room: units expected to come, for which storage is made at once.
        graphs: whether steps are recorded and replayed, once they have run a few times.
        ahead: up to so many tokens of a sequence replays run ahead (`locret.engine.ahead`); 0 =
            they do not.

    Attributes:
        fast, replayed, fused, ahead: see `StepCounts`; the last once it has ended.
    """

    def __init__(
        self, forward: ChunkForward, cache: RetainedCache, room: int, graphs: bool, ahead: int = 0
    ) -> None:
        self._forward = forward
        self._backbone = forward.backbone
        self._cache = cache
        self._room = room
        self._graphs = graphs
        self._last = ahead
        self._ahead: StepsAhead | None = None
        self._steps: StepPass | None = None
        self._graph: Any = None
        self._ids: Tensor | None = None
        self._outputs: Any = None
        self._eager = 0
        self._fused: PrenormDecoder | None = None
        self.fast = 0
        self.replayed = 0
        self.fused = 0
        self.ahead = 0

    def __call__(self, run: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """The model's outputs for `inputs`, as of any model where this is no step of ours."""
        ids = inputs.get("input_ids")
        if not self._is_step(ids, inputs):
            self.end()  # what it writes, the device's counters do not know
            return self._forward.outputs(run, inputs, self._cache)
        assert ids is not None
        self.fast += 1
        if self._steps is None or self._steps.left == 0:
            self._prepare()
        self.fused += self._fused is not None
        if self._graph is None and (not self._graphs or self._eager < EAGER_STEPS):
            self._eager += 1
            return self._step(run, ids)
        if self._graph is None:
            self._record(run, ids)
        else:
            assert self._steps is not None
            self._steps.advance()
        assert self._ids is not None and self._steps is not None
        self.replayed += 1
        if self._ahead is not None:
            more = self._steps.left > 0 and self._cache.seen < self._last - 1
            return as_output(self._ahead(ids, more), self._cache)
        self._ids.copy_(ids)
        self._graph.replay()
        return self._outputs

    def end(self) -> None:
        """Let go of what steps ran with, once nothing runs ahead any more."""
        if self._ahead is not None:
            self._ahead.end()
            self.ahead += self._ahead.used
        self._ahead = self._steps = self._graph = self._outputs = self._ids = None

    def _is_step(self, ids: Tensor | None, inputs: dict[str, Any]) -> bool:
        frozen = all(layer.rotated and not layer.is_empty for layer in self._cache.layers)
        one = ids is not None and ids.shape[1] == 1
        return one and frozen and asks_logits(inputs, self._cache)

    def _prepare(self) -> None:
        self.end()  # so that memory is free first
        self._steps = StepPass(self._backbone, self._cache, self._room)
        self._eager = 0
        dtype = self._cache.layers[0].store.like.dtype
        fuses = why_not_fused(self._backbone, dtype) is None
        self._fused = PrenormDecoder(self._backbone) if fuses else None

    def _step(self, run: Callable[..., Any], ids: Tensor) -> Any:
        assert self._steps is not None
        if self._fused is not None:
            outputs = as_output(self._fused.logits(ids, self._steps.take), self._cache)
            self._steps.advance()
            self._steps.end()
            return outputs
        with self._cache.during(self._steps):
            # Positions are the cache's business; the stock rotary module only needs a shape.
            outputs = run(
                input_ids=ids,
                position_ids=torch.zeros_like(ids),
                **as_argument(self._backbone.model, self._cache),
                use_cache=True,
                return_dict=True,
            )
            self._steps.end()
        return outputs

    def _record(self, run: Callable[..., Any], ids: Tensor) -> None:
        assert self._steps is not None
        self._ids = own = ids.clone()

        def step() -> Any:
            outputs = self._step(run, own)
            if self._last:
                own.copy_(likeliest(outputs.logits))
            return outputs

        with self._backbone.fixed_frequencies():
            self._graph, self._outputs = record(step, ids.device)
        if self._last:
            replay, rewind = self._graph.replay, self._steps.rewind
            self._ahead = StepsAhead(replay, rewind, own, self._outputs.logits)


def takes_steps(layer: RetainedLayer, folds: bool) -> bool:
    """Whether one-token steps of a layer can write in place and attend to all: nothing comes back
    from the host, and what is packed can be read, or written out, without waiting for the device.

    Args:
        folds: units count for what was folded into them, which the kernels of steps do not know.
    """
    if layer.host is not None or layer.is_empty or folds:
        return False
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
