"""Where figures come from: commit, hardware, versions, and what model and heads were."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from locret.system.files import file_hash, folder_hash

PACKAGES = ("locret", "torch", "transformers", "tokenizers", "peft", "lm_eval", "triton")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """The device, and the processor beside it."""
    found: dict[str, Any] = {
        "device": str(device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found |= {
            "accelerator": torch.cuda.get_device_name(device),
            "accelerator_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30),
        }
    return found


def commit() -> str | None:
    """The commit of this source tree, marked if files differ from it; None where none is known."""
    root = Path(__file__).resolve().parents[2]
    head = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if head is None:  # installed; a repository around the environment is another one
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head} with changes" if changed else head


def environment(device: torch.device) -> dict[str, Any]:
    """Commit, hardware and versions of a run."""
    return {"commit": commit(), "hardware": hardware(device), "versions": versions()}


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source(name: str | None) -> dict[str, Any] | None:
    """What an adapter or heads were: the name, the commit on the Hub, the hash of the files."""
    if name is None:
        return None
    path = Path(name)
    if (
        not path.exists()
    ):  # a repository that was fetched before, in a folder named after its commit
        try:
            path = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            return {"source": name, "sha256": None}
    found = {"source": name, "sha256": folder_hash(path) if path.is_dir() else file_hash(path)}
    return found if path == Path(name) else found | {"revision": path.name}
