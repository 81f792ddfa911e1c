"""Where a run's figures come from: everything that somebody needs to get the same ones."""

import time
from collections.abc import Sequence
from typing import Any

from locret.evaluation.preparing import Prepared
from locret.evaluation.questions import Question
from locret.evaluation.records import Record
from locret.evaluation.sessions import read_sessions, wall_seconds

SHOWN = 700  # characters of a prompt's beginning and end
OF_ONE_PROCESS = ("rank", "world", "started", "ended", "engines")


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
        "engines": {row: made for s in reversed(sessions) for row, made in s["engines"].items()},
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
        "rows": {q.row.label: q.row.to_dict() for q, _ in answered},
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
