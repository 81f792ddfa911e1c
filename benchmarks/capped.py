"""Runs a module as `python -m MODULE` does, within a part of the GPU's memory.

    python -m benchmarks.capped GIB FILE MODULE ARGUMENT...

The most that tensors took, and that the allocator held for them, is written to FILE twice a second.
"""

import json
import logging
import runpy
import sys
import threading
import time
from pathlib import Path

import torch

SECONDS = 0.5


def main() -> None:
    """Cap the memory, if there is a GPU, and run the module in this process."""
    gib, file, module, *arguments = sys.argv[1:]
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(float(gib) * 2**30 / whole, 1.0))
        threading.Thread(target=_watch, args=(Path(file),), daemon=True).start()
    logging.basicConfig()
    # transformers says here, and nowhere else, how much its cache holds.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.INFO)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _watch(file: Path) -> None:
    while True:
        peaks = {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
        new = file.with_suffix(".new")
        new.write_text(json.dumps(peaks), encoding="utf-8")
        new.replace(file)  # in one move: nobody reads half of it
        time.sleep(SECONDS)


if __name__ == "__main__":
    main()
