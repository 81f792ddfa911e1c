"""Rows of JSON Lines files, plain or gzipped; what is wrong names the file and the line.

Contexts with their questions are rows `{"id", "context", "qa": [{"question", "answers"}]}`.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with where it stands (`FILE:LINE`); empty lines are skipped.

    Raises:
        ValueError: the file cannot be read, or a line is no JSON object.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _row(line, f"{path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON Lines: {error}") from error


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} holds a {type(row).__name__}; expected an object")
    return row


def are_texts(value: Any) -> bool:
    """Whether this is a list of texts, at least one. A text alone would be read by its letters."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


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
