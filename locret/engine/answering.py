"""An answer: stock `generate` over a cache that has read the prompt; its one-token steps are
recorded as a CUDA graph (`GraphedSteps`), and run ahead of the host (`StepsAhead`).

Stock `generate` waits for each token, and then takes most of a millisecond to ask for the next one.
What a greedy answer asks for, the device knows before: the likeliest of its logits. So a step is
launched, on a stream beside the current one, while the host looks at the one before. Tokens that
come are compared with those: where they differ (a processor of logits, padding of a row that has
ended) the step is taken back, and no more run ahead. Python's counters know nothing of a step that
was not asked for. Its unit is in spare room, where the next one is written over it.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from locret.cache.cache import DECODE_ROOM, RetainedCache
from locret.cache.sizing import Sizing
from locret.engine.arguments import (
    BRANCHING,
    left_mask,
    longest,
    prompt_lengths,
    setting,
    stock_settings,
)
from locret.engine.attention import AnswerPass, Pass
from locret.engine.config import EngineConfig
from locret.engine.contexts import counts_of, one_if_equal
from locret.engine.reading import ChunkForward, asks_logits, without_mask
from locret.engine.steps import StepCounts, StepPass, takes_steps
from locret.kernels.dispatch import AVAILABLE
from locret.model.backbone import Backbone
from locret.model.hooks import as_argument, as_output, without_autocast
from locret.model.prenorm import PrenormDecoder, why_not_fused
from locret.policies.base import Eviction

EAGER_STEPS = 2  # steps before the graph is recorded: they compile kernels and make workspaces

MOST_ROOM = 8192  # tokens of an answer for which storage is made at once


@dataclass
class Answering:
    """Lets stock `generate` answer through an attached backbone.

    Attributes:
        model: as the user gave it, whose settings of `generate` count.
        last_steps: how the one-token steps of the last answer ran; None before the first.
    """

    model: Any
    backbone: Backbone
    forward: ChunkForward
    config: EngineConfig
    sizing: Sizing
    last_steps: StepCounts | None = None

    def generate(
        self,
        sequence: Tensor,
        cache: RetainedCache,
        context: int,
        padding: Sequence[int],
        kwargs: dict[str, Any],
    ) -> Any:
        """Stock generate over a sequence [B, n] whose first tokens `cache` has seen.

        Args:
            context: first tokens that are not returned.
            padding: how many leading tokens of each row stand for nothing.
        """
        beams, returned = (setting(self.model, kwargs, name) or 1 for name in BRANCHING)
        last = longest(self.model, kwargs, sequence)
        first = sequence.shape[1] - cache.seen
        eviction = self._eviction(cache, first, last)
        if eviction is not None:
            self._leave_slots(cache, eviction, first)
        if max(beams, returned) > 1:
            cache.batch_repeat_interleave(max(beams, returned))
            cache.token_ids = None  # whose rows are the beams' no more
        kwargs = kwargs | stock_settings(self.model, kwargs)
        room = min(max(last - cache.seen, DECODE_ROOM), MOST_ROOM)
        model, steps = self.model, None
        if eviction is None and beams == 1 and self._takes_steps(cache):
            ahead = last if may_run_ahead(model, kwargs) else 0
            graphs = bool(self.config.compute.graphs)
            steps = GraphedSteps(self.forward, cache, room, graphs, ahead)
        if steps is not None or any(padding):
            model = seen_through(self.backbone.model, steps or without_mask)
        current: Pass = AnswerPass(self.forward.attention.backend, room)
        seen = cache.seen
        with contextlib.ExitStack() as answer:
            reads = self.forward.reading(eviction) if eviction else current
            answer.enter_context(reads.during(cache))
            if steps is not None:
                answer.callback(steps.end)
            output = model.generate(
                sequence,
                attention_mask=left_mask(sequence, padding),
                **as_argument(self.backbone.model, cache, "generate"),
                **kwargs,
            )
        with without_autocast(sequence.device):
            for layer in cache.layers:
                layer.store.pack()
        # Beside those of new tokens, the call that reads what is left of a prompt, if that is one.
        taken = cache.seen - sequence.shape[1] + (sequence.shape[1] - seen == 1)
        counts = (steps.fast, steps.replayed, steps.fused, steps.ahead) if steps else ()
        self.last_steps = StepCounts(taken, *counts)
        plain = isinstance(output, Tensor)
        sequences = output if plain else output.sequences
        if beams == 1:  # else the cache's rows are the last beams, not the sequences returned
            cache.token_ids = sequences[:, : cache.seen].cpu()
            cache.unread_ids = sequences[:, cache.seen :].cpu()
        if plain:
            return sequences[:, context:]
        output.sequences = sequences[:, context:]
        return output

    def _takes_steps(self, cache: RetainedCache) -> bool:
        folds = cache.merging is not None and cache.merging.fold
        return self.fast_steps and all(takes_steps(layer, folds) for layer in cache.layers)

    @property
    def fast_steps(self) -> bool:
        """Whether one-token steps run with counters on the device (`locret.engine.steps`)."""
        backbone, fused = self.backbone, self.config.compute.backend != "eager" and AVAILABLE
        return fused and backbone.takes_steps and [d.type for d in backbone.devices] == ["cuda"]

    def _eviction(self, cache: RetainedCache, first: int, last: int) -> Eviction | None:
        """How layers evict while the answer comes, if that was asked for.

        Args:
            first: tokens that are read at once before it.
            last: tokens at most, with all before it.
        """
        interval = self.config.reading.decode_interval
        if interval is None or cache.budget is None:
            return None
        if cache.answered:
            raise ValueError(
                "decode_interval: this cache answered without eviction before, so that it holds "
                "units without a score; go on with the engine it came from, or read its context "
                "again"
            )
        if not cache.scored:
            raise ValueError(
                "decode_interval: this cache was read by an engine without it and holds no scores; "
                "read its context again with this engine"
            )
        # Before the next eviction come an interval's tokens, and, of which the first one is of the
        # answer before, as many as now that are read at once.
        sizing = replace(self.sizing, chunk=interval + first)
        whole, shape = max(cache.prompt_lengths), self.backbone.geometry
        kept = counts_of(cache.budget, shape.num_layers, shape.num_kv_heads)
        counts = self.config.answer_counts(self.forward.policy, sizing, kept, whole, last)
        cache.budget, slots = one_if_equal(counts), sizing.head_slots(last)
        return self.config.eviction(
            counts, cache.query_length, interval - 1, merging=cache.merging, slots=slots
        )

    def _leave_slots(self, cache: RetainedCache, eviction: Eviction, first: int) -> None:
        """Where a head kept more of a prompt, or of an answer, than leaves slots of the window for
        the `first` tokens that are read at once now, evict before them."""
        window, layers = self.sizing.window, cache.retained_layers
        if window is None or eviction.slots is None:
            return
        if max(layer.longest for layer in layers) + first > window:
            self.forward.evict(cache, replace(eviction, above=0))

    def lengthen(self, kwargs: dict[str, Any], front: int) -> None:
        """Make lengths that count the prompt count `front` tokens read in front of it too."""
        if front:
            for name, length in prompt_lengths(self.model, kwargs).items():
                kwargs[name] = length + front


def seen_through(model: Any, through: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> Any:
    """`model`, whose calls go through `through(run, inputs)` first. The model itself is left as it
    is: what is returned is another object of a subclass, with the same attributes."""
    kind: Any = type(model)
    seen: Any = object.__new__(_seen_class(kind))
    object.__setattr__(seen, "__dict__", model.__dict__)
    object.__setattr__(seen, "_through", through)  # a slot of its own, not the model's attribute
    return seen


@functools.cache
def _seen_class(kind: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(kind.__call__, self)
        return run(*args, **kwargs) if args else self._through(run, kwargs)

    body = {"__call__": call, "__slots__": ("_through",), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)


CHANGING = ("do_sample", "logits_processor", "prefix_allowed_tokens_fn", "custom_generate")
"""Arguments of stock `generate` with which tokens are often others than the likeliest."""


def may_run_ahead(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether steps run ahead in an answer asked for with these arguments."""
    return not any(setting(model, kwargs, name) for name in CHANGING)


def likeliest(logits: Tensor) -> Tensor:
    """The next tokens [B, 1] after logits [B, T, vocabulary], as stock `generate` takes them."""
    return logits[:, -1].float().argmax(dim=-1, keepdim=True)


class Launched(NamedTuple):
    """A step: its logits [B, 1, vocabulary] and the tokens [B, 1] that it chose, in memory of their
    own, and an event behind it."""

    logits: Tensor
    chosen: Tensor
    done: Any


class StepsAhead:
    """Runs recorded steps.

    Args:
        replay: runs a step of `ids`, with counters on the device; writes `logits`, and to `ids` the
            likeliest next tokens.
        rewind: takes the device's counters back by one step.
        ids: [B, 1] long.
        logits: [B, 1, vocabulary].

    Attributes:
        used: steps that were launched before they were asked for.
    """

    def __init__(
        self, replay: Callable[[], None], rewind: Callable[[], None], ids: Tensor, logits: Tensor
    ) -> None:
        self._replay, self._rewind, self._ids, self._logits = replay, rewind, ids, logits
        self._device = ids.device
        self._streams: Any = torch.get_device_module(ids.device)  # those of a CPU do nothing
        self._expected = ids  # what the next step was launched with
        self._next: Launched | None = None
        self._missed = False
        self.used = 0

    def __call__(self, ids: Tensor, more: bool) -> Tensor:
        """The logits [B, 1, vocabulary] for ids [B, 1], which the caller may keep.

        Args:
            more: another step may follow, and there is storage for it.
        """
        step, self._next = self._next, None
        if step is None:
            step = self._launch(ids)
        elif torch.equal(ids, self._expected):  # the host has waited for these tokens before
            self.used += 1
        else:
            step, self._missed = self._launch(ids, again=True), True
        if more and not self._missed:
            self._next = self._launch()
        self._streams.current_stream(self._device).wait_event(step.done)
        self._expected = step.chosen
        return step.logits

    def _launch(self, ids: Tensor | None = None, again: bool = False) -> Launched:
        """A step of ids [B, 1], or of what the last one chose; `again`: in place of the last."""
        # Memory of the current stream, where it is taken again only after that has waited.
        logits, chosen = torch.empty_like(self._logits), torch.empty_like(self._ids)
        beside = _stream_beside(self._device)
        beside.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(beside):
            if again:
                self._rewind()
            if ids is not None:
                self._ids.copy_(ids)
            self._replay()
            logits.copy_(self._logits)
            chosen.copy_(self._ids)
        return Launched(logits, chosen, beside.record_event())

    def end(self) -> None:
        """Wait for a step that no caller has asked for: storage may move then."""
        self._streams.synchronize(self._device)
        self._next = None


@functools.cache
def _stream_beside(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(device)


T = TypeVar("T")


def record(step: Callable[[], T], device: torch.device) -> tuple[Any, T]:
    """A graph of what `step` launches, which does not run yet, and what it returns: every replay
    writes there."""
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),  # which torch takes the current one for
        torch.cuda.graph(graph, stream=_recording_stream(device)),
    ):
        return graph, step()


@functools.cache
def _recording_stream(device: torch.device) -> Any:
    """What all graphs of a device are recorded on: torch has one for all devices, and cuBLAS keeps
    memory for each."""
    return torch.cuda.Stream(device)


class GraphedSteps:
    """Runs a model's one-token steps from a CUDA graph.

    Args:
        forward: reads what is no step, through the attached backbone.
        cache: of the request; its prompt is read by calls that this object declines.
        room: units expected to come, for which storage is made at once.
        graphs: whether steps are recorded and replayed, once they have run a few times.
        ahead: up to so many tokens of a sequence replays run ahead; 0 = they do not.

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
        if self._steps is not None:
            self._steps.close()
        self._ahead = self._steps = self._graph = self._outputs = self._ids = None

    def _is_step(self, ids: Tensor | None, inputs: dict[str, Any]) -> bool:
        layers = self._cache.layers
        frozen = all(layer.rotated or layer.window is not None for layer in layers)
        frozen = frozen and not any(layer.is_empty for layer in layers)
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
        with self._steps.during(self._cache):
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
