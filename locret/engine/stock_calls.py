"""Calls of an attached model by others than the engine: stock `generate` makes one for what is new
of a sequence, and one for each token of the answer.

A call that fails leaves its cache as it was before the call, as a failed `Engine.generate` does.
What is new, stock `generate` takes from the cache's length alone. Asked once more about the same
sequence, for example after a failure, it passes tokens that the cache has seen: their positions
show it, and the call is refused.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from locret.cache.cache import RetainedCache, Snapshot
from locret.engine.attention import Pass
from locret.model.hooks import cache_in


@contextlib.contextmanager
def doing(current: Pass, cache: RetainedCache) -> Iterator[None]:
    """Until the block ends, calls with the cache do this with it (`Pass.during`); if the block
    raises, the cache is as it was before it."""
    with cache.as_it_was(), current.during(cache):
        yield


@contextlib.contextmanager
def watched(decoder: nn.Module) -> Iterator[None]:
    """Until the block ends, calls of an attached `decoder` with a cache that the engine does
    nothing with (`RetainedCache.current`) are as the file's head says."""
    calls = _Calls()
    begin = decoder.register_forward_pre_hook(calls.begin, with_kwargs=True)
    end = decoder.register_forward_hook(calls.end, with_kwargs=True, always_call=True)
    try:
        yield
    finally:
        begin.remove()
        end.remove()
        calls.put_back()


class _Calls:
    """Hooks, and the cache of the call that runs with what it was before."""

    def __init__(self) -> None:
        self._begun: tuple[RetainedCache, Snapshot] | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        self.put_back()  # PyTorch calls no hook after an interrupt
        cache = cache_in(kwargs)
        if isinstance(cache, RetainedCache) and cache.current is None:
            ids = args[0] if args else kwargs.get("input_ids")
            if ids is not None:
                _check_new(cache, kwargs | {"input_ids": ids})
            self._begun = cache, cache.snapshot()

    def end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook, which is given no output after an error."""
        if output is None:
            self.put_back()
        self._begun = None

    def put_back(self) -> None:
        """Let the cache of a call that has not ended be what it was before."""
        if self._begun is not None:
            (cache, before), self._begun = self._begun, None
            cache.restore(before)


def _check_new(cache: RetainedCache, inputs: dict[str, Any]) -> None:
    """Refuse inputs of the model that do not follow what a cache has seen. ValueError: there is no
    token among `input_ids` [B, T], or `position_ids` [B or 1, T] say that they are others."""
    new = inputs["input_ids"].shape[1]
    if new and (new == 1 or _follow(cache, new, inputs)):
        return  # at the steps of an answer the device is not waited for
    what = "no token follows" if not new else f"the {new} tokens given are not those that follow"
    raise ValueError(
        f"the cache has seen {cache.seen} tokens, and {what}: stock generate takes the whole "
        "sequence, of which the cache has seen the beginning. To ask once more, take a "
        "cache.snapshot() before and restore it, or call engine.generate with what follows alone"
    )


def _follow(cache: RetainedCache, new: int, inputs: dict[str, Any]) -> bool:
    """Whether positions, if there are any, are those of so many tokens that the cache sees next."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None:
        return True
    behind = cache.seen + new - 1 - int(positions[..., -1].max())
    if behind in (0, min(cache.padding or (0,))):  # of the longest row, padding may not count
        return True
    return mask is not None and not mask.all()  # which is refused as padding
