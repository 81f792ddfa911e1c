"""When the host waits for the device while a layer is packed, and what the device does meanwhile.

How many blocks there will be, the device knows, and the host has to allocate and arrange them. In
that time the device would stand still: `meanwhile` gives it something to do. Whether all could be
stored, nobody needs to know before a chunk is read (`refusing_last`).
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

LARGEST = 2.0**15
"""Largest magnitude that is quantized; float16 ends not far above."""


@contextlib.contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Have `work` called once: where the block first waits by `from_device`, behind what it waits
    for, or at its end; not if it raises before. `work` queues what the block does not change."""
    given = [work]
    before = _given.set(given)
    try:
        yield
    finally:
        _given.reset(before)
    _call(given)


_given: ContextVar[list[Callable[[], None]] | None] = ContextVar("_given", default=None)


def _call(given: list[Callable[[], None]]) -> None:
    while given:
        given.pop()()


def from_device(x: Tensor) -> Tensor:
    """`x` on the host, which waits for it, but not for what `meanwhile` has queued behind it."""
    if x.is_cuda:
        host = x.to("cpu", non_blocking=True)  # to pinned memory
        came = torch.cuda.Event()
        came.record(torch.cuda.current_stream(x.device))
    else:
        host, came = x.cpu(), None
    _call(_given.get() or [])
    if came is not None:
        came.synchronize()
    return host


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x`, of the host, on the device, whose queue is not waited for. It would be if `x` were large
    and its memory not pinned."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@contextlib.contextmanager
def refusing_last() -> Iterator[None]:
    """Until the block ends, `refuse_where` waits for no device: it is answered, and refuses, at the
    end. What was packed meanwhile is to be given up then."""
    asked: dict[torch.device, list[Tensor]] = {}
    before = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(before)
    for unstorable in asked.values():
        refuse_where(torch.cat(unstorable).any())


_asked: ContextVar[dict[torch.device, list[Tensor]] | None] = ContextVar("_asked", default=None)


def refuse_where(unstorable: Tensor) -> None:
    """ValueError if `unstorable`, one number on any device, which is waited for, is not 0."""
    asked = _asked.get()
    if asked is not None:
        asked.setdefault(unstorable.device, []).append(unstorable.view(1))
    elif bool(unstorable):
        raise ValueError(
            f"cannot quantize: keys or values hold NaN, infinity or magnitudes above {LARGEST:.0f}"
            "; quantization 'none' stores them as they are"
        )
