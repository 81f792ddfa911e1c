"""Contexts with their questions: rows `{"id", "context", "qa": [{"question", "answers"}]}`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locret.tasks.jsonl import are_texts, read_rows


def read_contexts(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, in order, each with an `id`.

    Raises:
        ValueError: a line that is no such row; says where.
    """
    for number, (where, row) in enumerate(read_rows(path)):
        if not _is_context(row):
            raise ValueError(
                f'{where} has no "context" with a list "qa" of questions and answers; expected '
                '{"id", "context", "qa": [{"question", "answers": ["text", ...]}]}'
            )
        yield {"id": str(number)} | row


def _is_context(row: dict[str, Any]) -> bool:
    asked = row.get("qa")
    fields = {"question", "answers"}
    right = isinstance(asked, list) and all(
        isinstance(qa, dict)
        and fields <= set(qa)
        and isinstance(qa["question"], str)
        and are_texts(qa["answers"])
        for qa in asked
    )
    return right and isinstance(row.get("context"), str)
