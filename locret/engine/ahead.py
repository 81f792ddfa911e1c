"""Greedy steps that run one ahead of the host.

Stock `generate` waits for each token, and then takes most of a millisecond to ask for the next one.
What a greedy answer asks for, the device knows before: the likeliest of its logits. So a step is
launched, on a stream beside the current one, while the host looks at the one before. Tokens that
come are compared with those: where they differ (a processor of logits, padding of a row that has
ended) the step is taken back, and no more run ahead.

Python's counters know nothing of a step that was not asked for. Its unit is in spare room, where
the next one is written over it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.engine.arguments import setting

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
