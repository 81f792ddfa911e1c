"""One run in several processes: of this machine, `python -m locret evaluate --processes N`, or of
torchrun. Each knows its rank, and takes an accelerator in turn.

Each process loads the model and asks its share. On one accelerator that pays for small models,
whose time goes into launching kernels.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from locret.system import interrupts

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 10.0  # for processes that are asked to end
TOLD = 2000  # characters of what a failed process said


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> "Ranks":
        """As torchrun and accelerate say it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def device(self, wanted: str | None = None) -> str | None:
        """The device that was asked for; of several processes each takes an accelerator in turn.
        None = the default, also where accelerators are asked for and there are none."""
        on_cuda = wanted is None or wanted.startswith("cuda")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not on_cuda or (count and self.world == 1):
            return wanted
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        return f"cuda:{local % count}" if count else None


def run_together(
    arguments: Sequence[str], count: int, folder: Path, tell: Callable[[], None]
) -> None:
    """Run `python -m locret ARGUMENTS` in so many processes, which know their ranks, and call
    `tell` now and then. What they say goes into the folder, a file each. SIGTERM, which schedulers
    send, and SIGINT end them too, and this process (`locret.system.interrupts`).

    Raises:
        ValueError: one of them failed; says what it said. The others are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"{rank}.txt" for rank in range(count)]
    running: list[subprocess.Popen[bytes]] = []
    with interrupts.raised():
        try:
            for rank, log in enumerate(logs):
                with interrupts.delayed():  # a process that is started must also be in the list
                    running.append(_start(arguments, rank, count, log))
            while any(process.poll() is None for process in running):
                _refuse_failed(running, logs)
                tell()
                time.sleep(POLL_SECONDS)
            _refuse_failed(running, logs)
            tell()
        finally:
            with interrupts.delayed():
                _end(running)


def _end(running: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End processes, whatever they are doing."""
    for process in running:
        process.terminate()
    last = time.monotonic() + PATIENCE_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # such as one that waits for a device, and handles no signals meanwhile
            process.wait()


def _start(arguments: Sequence[str], rank: int, count: int, log: Path) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    command = [sys.executable, "-m", "locret", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def _refuse_failed(running: Sequence["subprocess.Popen[bytes]"], logs: Sequence[Path]) -> None:
    for process, log in zip(running, logs, strict=True):
        if process.poll():
            said = log.read_text(encoding="utf-8", errors="replace").strip()[-TOLD:]
            raise ValueError(f"a process ended with status {process.returncode} ({log}):\n{said}")
