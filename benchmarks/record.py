"""What every benchmark's JSON holds beside its figures: settings, commit, hardware, versions."""

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "triton", "lightning", "kvpress", "flash-attn")


def write(path: Path, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write one run's JSON and say where."""
    record = {
        "settings": dict(settings),
        "figures": dict(figures),
        "commit": _commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | _versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"wrote {path.resolve()}")


def hardware() -> str:
    """The accelerators' names, or the processor's."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median wall time of `work`, device included, after one run to warm up."""
    work()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def peak_gib(work: Callable[[], Any], device: torch.device) -> float | None:
    """Peak memory of the device while `work` runs, in GiB; None on the CPU."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) / 2**30


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
