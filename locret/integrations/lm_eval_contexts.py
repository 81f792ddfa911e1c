"""Where the context ends in a prompt of lm-evaluation-harness; what comes after is its question."""

from collections.abc import Mapping
from typing import Any


def context_end(
    prompt: str, document: Mapping[str, Any], field: str, marker: str | None
) -> int | None:
    """The character at which the context of a prompt ends: where the text of the document's field
    ends, else where the marker, with which questions begin, stands last. None if neither stands in
    the prompt."""
    text = document.get(field)
    if isinstance(text, str) and text.strip():
        start = prompt.rfind(text.strip())
        if start >= 0:
            return start + len(text.strip())
    start = prompt.rfind(marker) if marker else -1
    return None if start < 0 else start


def tokens_after(tokenizer: Any, text: str, character: int) -> int:
    """Tokens of `text` that end after a character of it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return sum(end > character for _, end in encoded["offset_mapping"])
