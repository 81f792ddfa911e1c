"""Calls of an attached model by others than the engine: stock `generate` makes one for what is new
of a sequence, and one for each token of the answer.

A call that fails leaves its cache as it was before the call, as a failed `Engine.generate` does.
What is new, stock `generate` takes from the cache's length alone. Asked once more about the same
sequence, for example after a failure, or about a shorter one, it passes tokens that the cache has
seen: the length of their mask shows it, or their positions, and the call is refused. Stock
`generate` leaves out a mask of ones, and a single token's position is not fetched from a GPU, which
would be waited for at every step of an answer.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from locret.cache.cache import RetainedCache, Snapshot
from locret.engine.attention import Pass
from locret.model.backbone import Backbone
from locret.model.hooks import cache_in


@contextlib.contextmanager
def doing(current: Pass, cache: RetainedCache) -> Iterator[None]:
    """Until the block ends, calls with the cache do this with it (`Pass.during`); if the block
    raises, the cache is as it was before it."""
    with cache.as_it_was(), current.during(cache):
        yield


@dataclass
class _Call:
    """A call that has begun, of the model or, within that or alone, of its decoder.

    Attributes:
        cache: its cache; before: what it was; restores: how often it had been restored by then.
        whole: it is the model's; reads: its decoder has begun.
    """

    cache: RetainedCache
    before: Snapshot
    restores: int
    whole: bool
    reads: bool = False


class StockCalls(threading.local):
    """The calls with a cache that the engine does nothing with (`RetainedCache.current`); those of
    each thread by themselves."""

    def __init__(self) -> None:
        self._begun: _Call | None = None

    @contextlib.contextmanager
    def watched(self, backbone: Backbone) -> Iterator[None]:
        """Until the block ends, those of an attached model are as the file's head says."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.put_back)
            for module, whole in ((backbone.model, True), (backbone.decoder, False)):
                begin = functools.partial(self._begin, whole)
                end = functools.partial(self._end, whole)
                before = module.register_forward_pre_hook(begin, with_kwargs=True)
                after = module.register_forward_hook(end, with_kwargs=True, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _begin(
        self, whole: bool, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook of the model, or of its decoder."""
        call, cache = self._begun, cache_in(kwargs)
        within = call is not None and call.cache is cache and call.whole > whole and not call.reads
        if not within:
            self.put_back()  # PyTorch calls no hook after an interrupt
            call = None
        if not isinstance(cache, RetainedCache) or cache.current is not None:
            return
        if not whole:
            check_new(cache, args, kwargs)
        if call is None:
            call = _Call(cache, cache.snapshot(), cache.restores, whole)
        call.reads, self._begun = not whole, call

    def _end(
        self, whole: bool, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of the same, which is given no output after an error."""
        if output is None:
            self.put_back()
        elif self._begun is not None and self._begun.whole == whole:
            self._begun = None

    def put_back(self) -> None:
        """Let the cache of a call that has not ended be what it was before, unless it was restored
        since."""
        call, self._begun = self._begun, None
        if call is not None and call.cache.restores == call.restores:
            call.cache.restore(call.before)


def check_new(cache: RetainedCache, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Refuse inputs of a decoder that do not follow what a cache has seen. ValueError: they are of
    another number of rows, or hold no token, or `attention_mask` [B, n] or `position_ids`
    [B or 1, T] say that they are others."""
    ids = args[0] if args else inputs.get("input_ids")
    given = inputs.get("inputs_embeds") if ids is None else ids
    if given is None:
        return
    (rows, new), has = given.shape[:2], cache.batch
    if has not in (None, rows):
        raise ValueError(
            f"the cache holds {has} rows, and {rows} are given; they must match. For beams or "
            "several answers, repeat its rows before: cache.batch_repeat_interleave"
        )
    why = _why_not_next(cache, new, inputs)
    if why is not None:
        raise ValueError(
            f"the cache has seen {cache.seen} tokens, and {why}. Stock generate takes the whole "
            "sequence, of which the cache has seen the beginning, and cannot draft tokens. To ask "
            "once more, take a cache.snapshot() before and restore it, or call engine.generate "
            "with what follows alone"
        )


def _why_not_next(cache: RetainedCache, new: int, inputs: dict[str, Any]) -> str | None:
    """Why so many tokens cannot be those that the cache sees next; None if they can."""
    if not new:
        return "no token follows"
    end, others = cache.seen + new, f"the {new} tokens given are not those that follow"
    if new == 1:
        others = "the token given is not the one that follows"
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = None
    if mask is not None and mask.shape[1] != end:
        return f"{others}: attention_mask is of {mask.shape[1]} tokens, not {end}"
    if positions is None or new == 1 and positions.device.type != "cpu":
        return None
    found = int(positions[..., -1].max()) + 1
    if end - found in (0, min(cache.padding or (0,))):  # of the longest row, padding may not count
        return None
    if mask is not None and not mask.all():
        return None  # which is refused as padding
    return f"{others}: position_ids end at {found - 1}, not {end - 1}"
