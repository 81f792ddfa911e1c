"""What flows from a source to a batch: a conversation, its sample, or the reason it gives none."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from torch import LongTensor

Tool = dict[str, Any]
"""A function that the assistant may call, as chat templates take it (`datamodules.tools`)."""


class _Text(TypedDict):
    role: str
    content: str


class Message(_Text, total=False):
    """One turn.

    Attributes:
        role: "system", "user", "assistant" or, for what a call returned, "tool".
        content: the text; may be empty where there are calls.
        tool_calls: of the assistant; left out where there are none (`datamodules.tools`).
        tool_call_id, name: of a tool's result, if the row says them.
    """

    tool_calls: list[Any]
    tool_call_id: str
    name: str


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer of the assistant.

    Attributes:
        messages: in order; the last one is the assistant's. Every message of the assistant is an
            answer to learn from.
        source: the data set that it comes from.
        id: a name within the source, for messages to people.
        place: where to find it, such as file:line; empty where there is no such place.
        tools: what the assistant may call.
    """

    messages: tuple[Message, ...]
    source: str = ""
    id: str = ""
    place: str = ""
    tools: tuple[Tool, ...] = ()

    def __post_init__(self) -> None:
        roles = [m["role"] for m in self.messages]
        if not roles or roles[-1] != "assistant":
            raise ValueError(
                f"conversation {self.id!r} has the roles {roles}, expected the last one to be "
                "'assistant': without an answer there is nothing to learn from"
            )


@dataclass
class Sample:
    """Tokens of one conversation.

    Attributes:
        input_ids: int64 [n], the conversation; it ends with the last answer.
        answers: (start, end) of each answer, offsets in `input_ids`, end exclusive, in order and
            without overlap; at least one token stands before the first; the last ends at n.
        cut: tokens that were removed before the last answer, 0 for most.
        answers_cut: tokens that the bound took from answers, 0 for most: the end of the last answer
            is removed; of an earlier one it stays, as prompt of the later ones, and labels nothing.
        source: as in the conversation.
        id: as in the conversation.
        answers_unmatched: earlier answers that the chat template renders in another way once the
            conversation has gone on (it drops reasoning, say); they are prompt and label nothing.
        answers_removed: earlier answers that went with the tokens in `cut`.
    """

    input_ids: LongTensor
    answers: tuple[tuple[int, int], ...]
    cut: int
    answers_cut: int
    source: str
    id: str
    answers_unmatched: int = 0
    answers_removed: int = 0

    @property
    def prompt_length(self) -> int:
        """Tokens before the last answer."""
        return self.answers[-1][0]


class Skipped(NamedTuple):
    """A conversation that gave no sample: where it is, why, its source, its index."""

    where: str
    reason: str
    source: str
    number: int


class SkippedRow(ValueError):
    """A conversation that gives no sample. `reason` is one of a few fixed texts, for counting."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(f"{where or 'row'} skipped: {reason}")
        self.reason = reason
        self.where = where

    def __reduce__(self) -> tuple[type["SkippedRow"], tuple[str, str]]:
        # The default rebuilds from the message alone, when a loader's worker hands the error over.
        return type(self), (self.reason, self.where)
