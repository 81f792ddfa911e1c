"""Where the context ends in a prompt that somebody else rendered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class ContextFinder:
    """Finds the end of the context in prompts.

    Attributes:
        field: of the document; where its text ends in the prompt, the context ends.
        marker: where this text stands last in the prompt, the question begins; for documents
            without the field.
    """

    field: str
    marker: str | None = None

    def end(self, prompt: str, document: Mapping[str, Any]) -> int | None:
        """The character at which the context ends; None if neither the field's text nor the marker
        stands in the prompt."""
        text = document.get(self.field)
        if isinstance(text, str) and text.strip():
            start = prompt.rfind(text.strip())
            if start >= 0:
                return start + len(text.strip())
        start = prompt.rfind(self.marker) if self.marker else -1
        return None if start < 0 else start

    def refuse(self, document: Mapping[str, Any], task: str) -> NoReturn:
        """Say that the context of a task's documents cannot be told from the question.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"task {task}: the context cannot be told from the question, because its documents "
            f"have no {self.field!r} whose text stands in the prompt (they have "
            f"{', '.join(sorted(document))}); give context_field, or question_marker: the text "
            "with which questions begin; or protocol=query_aware"
        )


def tokens_after(tokenizer: Any, text: str, character: int) -> int:
    """Tokens of `text` that end after a character of it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return sum(end > character for _, end in encoded["offset_mapping"])
