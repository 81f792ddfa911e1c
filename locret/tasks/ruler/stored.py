"""Generated samples, kept in files by what they depend on: task, length, seed, data, tokenizer."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from locret.system.files import file_hash, write_whole
from locret.tasks.base import Sample, Task


def stored_samples(
    task: Task, count: int, fingerprint: str, make: Callable[[], list[Sample]]
) -> list[Sample]:
    """The first `count` samples, from the file if it has as many, else made and kept."""
    if task.settings.cache_dir is None:
        return make()
    path = _path(task, task.settings.cache_dir, fingerprint)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ["0"]
    if int(lines[0]) >= count:
        return [_sample(line) for line in lines[1:]][:count]
    samples = make()
    rows = [str(count), *(json.dumps(asdict(sample)) for sample in samples)]
    write_whole(path, "\n".join(rows) + "\n")
    return samples


def _path(task: Task, folder: Path, fingerprint: str) -> Path:
    depends_on: dict[str, Any] = {
        "version": task.version,
        "seed": task.settings.seed,
        "tokenizer": fingerprint,
        "files": [file_hash(path) for path in task.files()],
    }
    if task.settings.max_new_tokens is not None:
        depends_on["max_new_tokens"] = task.settings.max_new_tokens  # of the length, it is a part
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    return folder / "samples" / f"{task.name}-{task.length}-{key}.jsonl"


def _sample(line: str) -> Sample:
    row = json.loads(line)
    return Sample(**row | {"answers": tuple(row["answers"])})
