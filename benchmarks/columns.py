"""Lines of a table, from columns: heading, format and the figure's name."""

from collections.abc import Mapping, Sequence
from typing import Any

Columns = Sequence[tuple[str, str, str]]


def heading(columns: Columns) -> str:
    """The headings in one line."""
    return " ".join(_aligned(name, form) for name, form, _ in columns)


def cells(row: Mapping[str, Any], columns: Columns) -> str:
    """A row's figures in one line; a dash stands for one that is not there."""
    return " ".join(
        _aligned("-", form) if row.get(name) is None else format(row[name], form)
        for _, form, name in columns
    )


def _aligned(text: str, form: str) -> str:
    return format(text, form.partition(".")[0])
