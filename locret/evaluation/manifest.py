"""Where a run's figures come from: everything that somebody needs to get the same ones. Beside it
what each process writes while it asks: when, where and with what.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locret.evaluation import provenance
from locret.evaluation.asking import Asker
from locret.evaluation.preparing import Prepared
from locret.evaluation.questions import Question
from locret.evaluation.records import Record
from locret.system.files import write_whole

SHOWN = 700  # characters of a prompt's beginning and end
OF_ONE_PROCESS = ("rank", "world", "started", "ended", "engines")
FOLDER = "sessions"


def manifest(
    prepared: Prepared, answered: Sequence[tuple[Question, Record]], command: str
) -> dict[str, Any]:
    """The manifest of a run that is complete."""
    sessions = read_sessions(prepared.output)
    tasks = {question.task.label: question.task for question, _ in answered}
    records = [record for _, record in answered]
    return {
        "command": command,
        "config": prepared.config.to_dict(),
        "sources": prepared.sources,
        "computed": _different(sessions),
        "engines": {
            setup: made for s in reversed(sessions) for setup, made in s["engines"].items()
        },
        "processes": max((session["world"] for session in sessions), default=0),
        "protocols": {
            "query_agnostic": "the context is compressed before the question is read",
            "query_aware": "the policy sees the question before the final eviction; query-aware "
            "heads get it in front of the context",
        },
        "decoding": "greedy",
        "stop_rules": {
            label: {"max_new_tokens": task.max_new_tokens, "strings": list(task.stop)}
            for label, task in tasks.items()
        },
        "first_prompts": _first_prompts(answered),
        "truncation": {
            "prompts_cut": sum(record.cut > 0 for record in records),
            "tokens_cut": sum(record.cut for record in records),
            "answer_cut": sum(record.answer_cut for record in records),
        },
        "setups": {q.setup.label: q.setup.to_dict() for q, _ in answered},
        "wall_seconds": wall_seconds(sessions),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _different(sessions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the sessions ran on, each different set of facts once."""
    facts = [{k: v for k, v in s.items() if k not in OF_ONE_PROCESS} for s in sessions]
    return [fact for i, fact in enumerate(facts) if fact not in facts[:i]]


def _first_prompts(answered: Sequence[tuple[Question, Record]]) -> dict[str, Any]:
    first: dict[str, Any] = {}
    for question, _ in answered:
        prompt = question.prompt
        if question.task.label not in first:
            first[question.task.label] = {
                "text": shortened(prompt.text),
                "tokens": len(prompt.ids),
                "context_tokens": prompt.context_end,
                "question_tokens": prompt.question_end - prompt.context_end,
                "sha256_of_tokens": prompt.key,
            }
    return first


def shortened(text: str) -> str:
    """A long text without its middle, which is counted."""
    left_out = len(text) - 2 * SHOWN
    if left_out <= 0:
        return text
    return f"{text[:SHOWN]} [... {left_out} characters ...] {text[-SHOWN:]}"


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
