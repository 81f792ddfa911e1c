"""Contexts that were read once and are asked many times: stored ones by their id, in memory and as
files; beginnings that several requests share by their tokens.

In a folder, where other processes find it, a context is a folder `ID` as `RetainedCache.save`
writes it, and beside it `ID.json`, which is written last and says what it is. The time of the last
use is that of `ID.json`.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locret.cache.cache import RetainedCache
from locret.quantities import format_bytes
from locret.serve.requests import ID, ContextInfo, TooLong, UnknownContext


@dataclass
class _Stored:
    """A context; `cache` is None while it is only on disk. `used`: when it was asked last."""

    info: ContextInfo
    used: float
    cache: RetainedCache | None = None


class Contexts:
    """Stored contexts. Those used least recently make room for new ones. Thread-safe.

    Args:
        folder: where they are kept, for other processes and after a restart; None = in memory.
        most_bytes: that all of them may take; None = no limit.
        ttl_seconds: after so long without use a context is deleted; None = never.
        memory_bytes: with a folder, that those in memory may take; others are loaded when they are
            asked. None = all stay.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        folder: Path | None = None,
        most_bytes: int | None = None,
        ttl_seconds: float | None = None,
        memory_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.most_bytes, self.ttl_seconds, self.memory_bytes = most_bytes, ttl_seconds, memory_bytes
        self._files = None if folder is None else ContextFiles(folder)
        self._clock = clock
        self._stored: dict[str, _Stored] = {}
        self._lock = threading.RLock()

    @property
    def bytes_in_memory(self) -> int:
        """What contexts take on the device now."""
        with self._lock:
            return sum(one.info.bytes for one in self._stored.values() if one.cache is not None)

    @property
    def device_bytes(self) -> int:
        """Most that they may take on the device; 0 where there is no limit."""
        limits = [self.most_bytes, None if self._files is None else self.memory_bytes]
        return min((limit for limit in limits if limit is not None), default=0)

    @property
    def count(self) -> int:
        """How many are stored."""
        with self._lock:
            self._refresh()
            return len(self._stored)

    def put(self, cache: RetainedCache) -> ContextInfo:
        """Store a context of one row, under a new id. Raises TooLong: it takes more bytes than all
        contexts may."""
        info = info_of(cache, f"ctx_{secrets.token_urlsafe(16)}")
        if self.most_bytes is not None and info.bytes > self.most_bytes:
            raise TooLong(
                f"the context takes {format_bytes(info.bytes)} and all contexts together may take "
                f"{format_bytes(self.most_bytes)}; send a shorter one"
            )
        now = self._clock()
        if self._files is not None:
            self._files.write(info, cache, now)
        with self._lock:
            self._stored[info.id] = _Stored(info, now, cache)
            self._make_room()
        return info

    def get(self, id: str, model: Any = None) -> RetainedCache:
        """The context, which counts as used now. It is stored still: go on with a fork of it.

        Args:
            model: that it is asked with; needed for contexts on disk.

        Raises:
            UnknownContext: it is not there, not any more, or this model cannot go on with it.
        """
        with self._lock:
            one = self._used(id)
            cache = one.cache
        if cache is None:
            try:
                cache = self._load(id, model)  # takes long; others may ask what is there meanwhile
            except ValueError as error:  # it names files, which are nobody's business
                raise UnknownContext(
                    f"context {id} is damaged, or was read by another model; upload it again"
                ) from error
            with self._lock:
                one.cache = cache
                self._leave_memory()
        return cache

    def info(self, id: str) -> ContextInfo:
        """Raises UnknownContext: it is not there, or not any more."""
        with self._lock:
            return self._find(id).info

    def use(self, id: str) -> ContextInfo:
        """As `info`, and it counts as used now. Raises UnknownContext: it is not there, or not any
        more."""
        with self._lock:
            return self._used(id).info

    def delete(self, id: str) -> None:
        """Raises UnknownContext: it is not there, or not any more."""
        with self._lock:
            self._find(id)
            self._remove(id)

    def forget_loaded(self) -> None:
        """Take contexts that are on disk too out of memory."""
        with self._lock:
            for one in self._stored.values() if self._files is not None else ():
                one.cache = None

    def _load(self, id: str, model: Any) -> RetainedCache:
        assert self._files is not None
        try:
            return RetainedCache.load(self._files.folder / id, model)
        except ValueError:
            self.info(id)  # it may have been deleted just now
            raise

    def _find(self, id: str) -> _Stored:
        one = self._known(id) if isinstance(id, str) and ID.fullmatch(id) else None
        if one is None:
            raise UnknownContext("there is no context of this id (any more); send its text again")
        return one

    def _used(self, id: str) -> _Stored:
        one = self._find(id)
        one.used = self._clock()
        if self._files is not None:
            self._files.use(id, one.used)
        return one

    def _known(self, id: str) -> _Stored | None:
        """The context as memory and files have it; None if it is not there or too old."""
        one = self._stored.get(id)
        if self._files is not None:
            found = self._files.find(id)
            if found is None:
                self._stored.pop(id, None)
                return None
            info, used = found
            one = self._stored.setdefault(id, _Stored(info, used))
            one.used = max(one.used, used)  # another process may have used it
        if one is not None and self._expired(one):
            self._remove(id)
            return None
        return one

    def _expired(self, one: _Stored) -> bool:
        return self.ttl_seconds is not None and self._clock() - one.used > self.ttl_seconds

    def _remove(self, id: str) -> None:
        self._stored.pop(id, None)
        if self._files is not None:
            self._files.remove(id)

    def _refresh(self) -> None:
        """Know all contexts that are there, and none that are too old."""
        on_disk = [] if self._files is None else [*self._files.ids()]
        for id in {*on_disk, *self._stored}:
            self._known(id)

    def _by_use(self) -> Sequence[_Stored]:
        return sorted(self._stored.values(), key=lambda one: one.used)

    def _make_room(self) -> None:
        self._refresh()
        for one in _beyond(self._by_use(), self.most_bytes):
            self._remove(one.info.id)
        self._leave_memory()

    def _leave_memory(self) -> None:
        """Let what does not fit into memory be on disk only; what was used last stays."""
        loaded = [one for one in self._by_use() if one.cache is not None]
        for one in _beyond(loaded, self.memory_bytes) if self._files is not None else ():
            if one is not loaded[-1]:
                one.cache = None

    def list(self) -> Sequence[ContextInfo]:
        """All contexts, the one used last first."""
        with self._lock:
            self._refresh()
            return [one.info for one in reversed(self._by_use())]


def _beyond(stored: Sequence[_Stored], most_bytes: int | None) -> Iterator[_Stored]:
    """The first ones, as many as take more than `most_bytes` with the others; None = no limit."""
    over = 0 if most_bytes is None else sum(one.info.bytes for one in stored) - most_bytes
    for one in stored:
        if over <= 0:
            return
        yield one
        over -= one.info.bytes


def info_of(cache: RetainedCache, id: str = "") -> ContextInfo:
    """What a cache of one row holds."""
    report = cache.report()
    units = round(sum(report["units"]) / len(report["units"]))
    slots = cache.seen if cache.positions == "original" else max(report["most_units"])
    return ContextInfo(id, cache.seen, units, cache.nbytes, slots)


# ---- beginnings of prompts -----------------------------------------------------------------------


SHARED_LEAST = 256
"""Tokens from which on a shared beginning of prompts is kept: fewer are read as fast."""


class Prefixes:
    """Contexts of exactly the tokens asked for, of at most so many bytes together (0 = none is
    kept). Those used least recently make room for new ones. The generation thread alone uses it."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._caches: OrderedDict[bytes, RetainedCache] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in [*self._caches.values()])

    def shared(self, prompt: Sequence[int], shared: int) -> int:
        """Leading tokens of a prompt to keep, where others begin with the same `shared` ones; 0 =
        none."""
        shared = min(shared, len(prompt) - 1)
        if shared < SHARED_LEAST or not self.most_bytes:
            return 0
        # The engine takes a question that begins with its whole context for a mistake.
        repeats = prompt[shared : 2 * shared] == prompt[:shared]
        return 0 if repeats else shared

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


# ---- contexts as files ---------------------------------------------------------------------------

ABANDONED = 3600.0  # seconds after which a folder without a record is not being written any more


class ContextFiles:
    """The contexts in a folder, which is made if it is not there. OSError where nothing can be
    written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OSError(f"cannot write contexts to {folder}: {error.strerror}") from error
        self._sweep()

    def write(self, info: ContextInfo, cache: RetainedCache, now: float) -> None:
        """Store a context, used `now`.

        Raises:
            OSError: it cannot be written; nothing of it is left.
        """
        record = self._record(info.id)
        aside = record.with_suffix(".tmp")
        try:
            cache.save(self.folder / info.id)
            aside.write_text(json.dumps(asdict(info)), encoding="utf-8")
            os.utime(aside, (now, now))
            aside.replace(record)
        except OSError:  # a full disk must not stay full of what nobody can ask
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
                self.remove(info.id)
            raise

    def find(self, id: str) -> tuple[ContextInfo, float] | None:
        """What is known of a context and when it was used last; None if it is not there."""
        record = self._record(id)
        try:
            info = ContextInfo(**json.loads(record.read_text(encoding="utf-8")))
            return info, record.stat().st_mtime
        except (OSError, ValueError, TypeError):
            return None

    def use(self, id: str, now: float) -> None:
        """Say that a context was used `now`; nothing if it is not there any more."""
        try:
            os.utime(self._record(id), (now, now))
        except OSError:
            return

    def remove(self, id: str) -> None:
        """Delete a context, if it is there."""
        self._record(id).unlink(missing_ok=True)
        shutil.rmtree(self.folder / id, ignore_errors=True)

    def ids(self) -> Iterator[str]:
        for record in self.folder.glob("*.json"):
            if ID.fullmatch(record.stem):
                yield record.stem

    def _record(self, id: str) -> Path:
        return self.folder / f"{id}.json"

    def _sweep(self) -> None:
        """Delete what processes left that were killed while they wrote."""
        for path in self.folder.iterdir():
            ours = (
                path.is_dir() and ID.fullmatch(path.name) and not self._record(path.name).exists()
            )
            if ours and time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
