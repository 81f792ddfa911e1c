"""When and where a run's answers were computed: a small file for every process that asked."""

import json
import time
from pathlib import Path
from typing import Any

from locret.evaluation import provenance
from locret.evaluation.asking import Asker
from locret.system.files import write_whole

FOLDER = "sessions"


class Session:
    """One process's part in a run. Its file says how far it came, should it be killed.

    Args:
        folder: of the run.
        rank, world: which process of how many.
        asker: its model.
    """

    def __init__(self, folder: Path, rank: int, world: int, asker: Asker) -> None:
        started = time.time()
        self._path = folder / FOLDER / f"{started:.0f}-{rank}.json"
        self._facts = {"rank": rank, "world": world, "started": started, **_facts(asker)}
        self._asker = asker
        self.beat()

    def beat(self) -> None:
        """Still at work."""
        now = {"ended": time.time(), "engines": self._asker.engines.used}
        write_whole(self._path, json.dumps(self._facts | now, indent=1, default=str))


def _facts(asker: Asker) -> dict[str, Any]:
    model, loaded = asker.model, asker.loaded
    return {
        "model_revision": loaded.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "generation_config": model.generation_config.to_diff_dict(),
        "end_tokens": asker.end_tokens,
        "hardware": provenance.hardware(model.device),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """What the processes of a run wrote, earliest first."""
    files = (folder / FOLDER).glob("*.json")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return sorted(found, key=lambda session: session["started"])


def wall_seconds(sessions: list[dict[str, Any]]) -> float:
    """Time during which any process was at work."""
    total, until = 0.0, 0.0
    for session in sorted(sessions, key=lambda session: session["started"]):
        total += max(0.0, session["ended"] - max(session["started"], until))
        until = max(until, session["ended"])
    return round(total, 1)
