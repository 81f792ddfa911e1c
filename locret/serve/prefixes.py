"""Beginnings that several requests share, read once: kept in memory, found by their tokens."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from locret.cache.cache import RetainedCache


class Prefixes:
    """Contexts of exactly the tokens asked for. Those used least recently make room for new ones.
    The generation thread alone uses it.

    Args:
        most_bytes: that all of them may take; 0 = none is kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._caches: OrderedDict[bytes, RetainedCache] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in [*self._caches.values()])

    def get(self, tokens: Sequence[int]) -> RetainedCache | None:
        """The context of these tokens, if it was kept. Go on with a fork of it."""
        name = _name(tokens)
        if name not in self._caches:
            return None
        self._caches.move_to_end(name)
        return self._caches[name]

    def put(self, tokens: Sequence[int], cache: RetainedCache) -> None:
        """Keep a context of one row, if there is room for it at all."""
        if cache.nbytes > self.most_bytes:
            return
        self._caches[_name(tokens)] = cache
        while self.nbytes > self.most_bytes:
            self._caches.popitem(last=False)

    def clear(self) -> None:
        self._caches.clear()


def _name(tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(array("q", tokens).tobytes()).digest()
