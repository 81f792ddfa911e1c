"""What every benchmark's JSON holds beside its figures: settings, commit, hardware, versions."""

import gc
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from locret.evaluation.records import commit, versions
from locret.system.files import write_whole

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "lightning",
    "kvpress",
    "flash-attn",
    "optimum-quanto",
    "hqq",
    "torchao",
)
PATHS = ("out", "plot")


def write(
    path: Path, settings: Mapping[str, Any], figures: Mapping[str, Any], *, announce: bool = True
) -> None:
    """Write one run's JSON and say where.

    The file is replaced in one move, so that a long run can write after every step and be killed
    at any time. Where files went is left out of the settings.
    """
    record = {
        "settings": {name: value for name, value in settings.items() if name not in PATHS},
        "figures": dict(figures),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(PACKAGES) | _device_libraries(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_whole(path, json.dumps(record, indent=1, default=str) + "\n")
    if announce:
        print(f"wrote {path.resolve()}", flush=True)


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
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def peak_gib(work: Callable[[], Any], device: torch.device) -> float | None:
    """Peak memory of the device while `work` runs, in GiB; None on the CPU."""
    reset_peak(device)
    work()
    return peaks_gib(device)["peak_gib"]


def reset_peak(device: torch.device) -> None:
    """Let `peaks_gib` count from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks_gib(device: torch.device) -> dict[str, float | None]:
    """The most that tensors took, and that the allocator held for them; None on the CPU."""
    if device.type != "cuda":
        return {"peak_gib": None, "reserved_gib": None}
    return {
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_libraries() -> dict[str, str]:
    found = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {name: str(version) for name, version in found.items() if version}
