"""Stored contexts as files, so that another process finds them: a folder `ID` as
`RetainedCache.save` writes it, and beside it `ID.json`, which is written last and says what it is.
The time of the last use is that of `ID.json`."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from locret.cache.cache import RetainedCache
from locret.serve.requests import ID, ContextInfo

ABANDONED = 3600.0  # seconds after which a folder without a record is not being written any more


class ContextFiles:
    """The contexts in a folder, which other processes may use too. It is made if it is not there;
    OSError where nothing can be written."""

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

    def load(self, id: str, model: Any) -> RetainedCache:
        """The context, to be asked with `model`. Raises ValueError: it is damaged, not there, or
        one of another model."""
        return RetainedCache.load(self.folder / id, model)

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
