"""How far a long command is, on stderr: a bar on a terminal, elsewhere a line every few seconds."""

import contextlib
import sys
import threading
import time
from typing import Any

SECONDS = 5.0
"""Between two lines: a log of hours stays readable, and a reader sees soon that it goes on."""

LOOKS_EVERY = 1.0  # seconds


class Progress:
    """Called with what is done and what there is to do, as often as one likes: shows a bar on a
    terminal, and elsewhere a plain line every few seconds. As a context manager it also says that
    the work goes on while nothing is done, before the first call too.

    Args:
        label: what the command is at, such as "asking".
        things: what is counted, such as "answers".
    """

    def __init__(self, label: str, things: str = "answers") -> None:
        self.label = label
        self.things = things
        self._bar: Any = None
        self._began: tuple[float, int] | None = None
        self._at: tuple[int, int] | None = None
        self._entered = self._told = 0.0
        self._ended = False
        self._lock: Any = contextlib.nullcontext()  # a real one only while a thread tells too
        self._leave: Any = None

    def __call__(self, done: int, total: int) -> None:
        with self._lock:
            self._at = done, total
            if sys.stderr.isatty():
                self._show_bar(done, total)
            else:
                self._tell(done, total)

    def __enter__(self) -> "Progress":
        self._entered = self._told = time.monotonic()
        self._lock, left = threading.Lock(), threading.Event()
        thread = threading.Thread(target=self._keep_telling, args=(left,), daemon=True)
        thread.start()

        def leave() -> None:
            left.set()
            thread.join()

        self._leave = leave
        return self

    def __exit__(self, *exception: Any) -> None:
        self._leave()
        self._lock, self._leave = contextlib.nullcontext(), None

    def _show_bar(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, desc=self.label, disable=None, leave=False)
        self._bar.update(done - self._bar.n)
        self._ended = done >= total
        if done == total:
            self._bar.close()
            self._bar = None

    def _tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        first = self._began is None
        began, done_before = self._began = self._began or (now, done)
        if self._ended or not (first or done >= total or now - self._told >= SECONDS):
            return
        self._told, self._ended = now, done >= total
        line = f"{self.label}: {done:,} of {total:,} {self.things}"
        if done >= total:
            line += f", {_duration(now - began)} in all"
        elif done > done_before:
            left = (now - began) / (done - done_before) * (total - done)
            line += f", about {_duration(left)} left"
        _print(line)

    def _keep_telling(self, left: threading.Event) -> None:
        while not left.wait(LOOKS_EVERY):
            with self._lock:
                if not self._ended:
                    self._tell_that_it_goes_on()

    def _tell_that_it_goes_on(self) -> None:
        if self._bar is not None:
            self._bar.refresh()  # shows the time that has passed
            return
        now = time.monotonic()
        if now - self._told < SECONDS:
            return
        self._told = now
        line = f"{self.label}: "
        if self._at is not None:
            line += f"{self._at[0]:,} of {self._at[1]:,} {self.things}, "
        _print(f"{line}{_duration(now - self._entered)} so far")


class Answering:
    """A streamer for stock `generate` that tells how much of an answer of at most `most` tokens
    there is."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._done = -1  # the prompt comes first
        self._progress = Progress("answering", "tokens")

    def put(self, value: Any) -> None:
        self._done += 1
        self._progress(self._done, self._most)

    def end(self) -> None:
        self._progress(self._done, self._done)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
