"""What long commands say: how far they are, on stderr, and at the end what can be done next."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""Between two lines: a log of hours stays readable, and a reader sees soon that it goes on."""


class Progress:
    """Called with what is done and what there is to do, as often as one likes: shows a bar on a
    terminal, and elsewhere a plain line every few seconds.

    Args:
        label: what the command is at, such as "asking".
        things: what is counted, such as "answers".
    """

    def __init__(self, label: str, things: str = "answers") -> None:
        self.label = label
        self.things = things
        self._bar = Bar(label)
        self._began: tuple[float, int] | None = None
        self._told = 0.0
        self._ended = False

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            self._bar(done, total)
        else:
            self._tell(done, total)

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
        print(line, file=sys.stderr, flush=True)


class Bar:
    """A progress bar on a terminal."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.label, disable=None, leave=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
            self.bar = None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def report_of(path: Path) -> list[str]:
    """The command that makes tables and figures of a file of answers."""
    return ["report", str(path), "--out", str(path.with_name(f"{path.stem}-report"))]


def say_next(commands: Sequence[Sequence[str]]) -> None:
    """Print commands that go on from here, each given as the words behind `python -m locret`."""
    for place, words in enumerate(commands):
        print(f"{'' if place else 'next':<9}python -m locret {shlex.join(words)}")
