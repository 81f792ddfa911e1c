"""When each token of an answer arrives, and an end to runs that take too long."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from benchmarks import record


class OutOfTime(Exception):
    """The time given to a benchmark is over."""


class AnswerClock(BaseStreamer):
    """A streamer that notes the seconds from `start()` to every new token's arrival on the host.

    Args:
        device: what to wait for before the clock starts.
        deadline: of `time.monotonic()`, after which `put` and `check` raise `OutOfTime`.
    """

    def __init__(self, device: torch.device, deadline: float = float("inf")) -> None:
        self.device = device
        self.deadline = deadline
        self.times: list[float] = []

    def start(self) -> None:
        record.synchronize(self.device)
        self.times.clear()
        self._started = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Take [B] new tokens; the prompt [B, n] that stock generate puts first is none."""
        if value.dim() > 1:
            return
        value.cpu()  # waits for the device, if it is still at it
        self.times.append(time.perf_counter() - self._started)
        self.check()

    def end(self) -> None:
        """Nothing is left to note."""

    def check(self, *_: Any) -> None:
        """Stop the run if its time is over; also a `progress` of `locret.Engine`."""
        if time.monotonic() > self.deadline:
            raise OutOfTime(f"stopped after {len(self.times)} tokens: the time given is over")
