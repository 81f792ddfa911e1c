"""Conversations, and the rows of known schemas that hold them.

Tools that a conversation offers and calls are in the form that chat templates take:

    a tool     {"type": "function", "function": {"name", "description", "parameters"}}
    a call     {"type": "function", "id", "function": {"name", "arguments"}}
    a result   {"role": "tool", "tool_call_id", "content"}
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

SCHEMAS = (
    '{"context", "qa": [{"question", "answers": [..]}]}, '
    '{"messages": [{"role", "content"}][, "tools"]}, '
    '{"conversations": [{"from", "value"}]} or {"instruction", "output"[, "input"]}'
)
FIELDS = (
    *("id", "source", "context", "qa", "messages", "conversations"),
    *("instruction", "input", "output", "tools"),
)
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
PARTS = ("image", "image_url", "audio", "input_audio", "video", "file", "refusal")
"""Kinds of content parts that are known and not text."""

# A hundred times any context window: tokenising such a text takes seconds and gigabytes, once each
# time that it is drawn.
MAX_CHARACTERS = 16 * 2**20


Tool = dict[str, Any]
"""A function that the assistant may call, as chat templates take it."""


class _Text(TypedDict):
    role: str
    content: str


class Message(_Text, total=False):
    """One turn.

    Attributes:
        role: "system", "user", "assistant" or, for what a call returned, "tool".
        content: the text; may be empty where there are calls.
        tool_calls: of the assistant; left out where there are none.
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
        context: how the last text before the answer begins, where the row tells the context from
            the question; the question follows. Empty where it does not.
        questions: all that is asked about the context, this one included: what follows the context
            in the prompt, and the answer.
    """

    messages: tuple[Message, ...]
    source: str = ""
    id: str = ""
    place: str = ""
    tools: tuple[Tool, ...] = ()
    context: str = ""
    questions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        roles = [m["role"] for m in self.messages]
        if not roles or roles[-1] != "assistant":
            raise ValueError(
                f"conversation {self.id!r} has the roles {roles}, expected the last one to be "
                "'assistant': without an answer there is nothing to learn from"
            )
        if self.context and not self.prompt_text.startswith(self.context):
            raise ValueError(
                f"conversation {self.id!r} has a context that is not how its last text before the "
                "answer begins; expected the context, then the question"
            )

    @property
    def prompt_text(self) -> str:
        """The last text before the answer."""
        return self.messages[-2]["content"] if len(self.messages) > 1 else ""


class SkippedRow(ValueError):
    """A conversation that gives no sample. `reason` is one of a few fixed texts, for counting."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(f"{where or 'row'} skipped: {reason}")
        self.reason = reason
        self.where = where

    def __reduce__(self) -> tuple[type["SkippedRow"], tuple[str, str]]:
        # The default rebuilds from the message alone, when a loader's worker hands the error over.
        return type(self), (self.reason, self.where)


def parse_row(row: Mapping[str, Any]) -> list[Conversation]:
    """The conversations of one row, of any schema in `SCHEMAS`; for "qa" rows one a question.

    A row's own "source" and "id" are taken over. A question without an answer gives a conversation
    whose answer is empty, which the encoder then skips and counts.

    Raises:
        ValueError: if the row has no schema that is known, a field of the wrong kind, or a text
            above `MAX_CHARACTERS`. The message is one of a few fixed texts.
    """
    if not isinstance(row, Mapping):
        raise ValueError("not an object")
    for key, parse in _PARSERS.items():
        if row.get(key) is not None:
            return parse(row)
    raise ValueError("unknown schema")


def messages_to_conversation(
    row: Mapping[str, Any], messages: Iterable[Message], number: str = ""
) -> Conversation:
    """A conversation with the row's "source", "id" and "tools"; `number` is appended to the id."""
    source, name = (_name(row.get(key)) for key in ("source", "id"))
    tools = tools_of(row.get("tools"))
    _text(json.dumps(tools), "tools")
    return Conversation(tuple(messages), source, name + number, tools=tools)


def exchange(prompt: str, answer: str) -> tuple[Message, Message]:
    """One question of the user and the answer to it."""
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}


def _name(value: Any) -> str:
    # Names are printed and stored, so half a surrogate pair must not stay in them.
    return "" if value is None else str(value)[:200].encode(errors="replace").decode()


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field} is not text")
    if len(value) > MAX_CHARACTERS:
        raise ValueError(f"{field} is over {MAX_CHARACTERS} characters")
    return value


def _parse_qa(row: Mapping[str, Any]) -> list[Conversation]:
    context, qa = _text(row.get("context"), "context"), row["qa"]
    if not context.strip():
        raise ValueError("empty context")
    if not isinstance(qa, list) or not qa or not all(isinstance(item, Mapping) for item in qa):
        raise ValueError("qa is not a list of questions")
    questions = tuple(map(_parse_question, qa))
    return [
        replace(
            messages_to_conversation(row, exchange(context + question, answer), f"#{i}"),
            context=context,
            questions=questions,
        )
        for i, (question, answer) in enumerate(questions)
    ]


def _parse_question(item: Mapping[str, Any]) -> tuple[str, str]:
    """What follows the context, and the answer."""
    question, answers = _text(item.get("question") or "", "question"), item.get("answers") or [""]
    if not isinstance(answers, list):
        raise ValueError("answers is not a list")
    # Without a question the context is the whole prompt, and holds it already.
    return f"\n\n{question}" if question.strip() else "", _text(answers[0], "answer")


def _parse_chat(row: Mapping[str, Any]) -> list[Conversation]:
    turns = row["messages"] if row.get("messages") is not None else row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("messages is not a list of turns")
    messages = [_parse_turn(turn) for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # a last question that nobody answered
    if not messages:
        raise ValueError("no message of the assistant")
    return [messages_to_conversation(row, messages)]


def _parse_turn(turn: Mapping[str, Any]) -> Message:
    role = _text(turn.get("role") or turn.get("from"), "role").lower()
    if turn.get("function_call") is not None:
        raise ValueError("function_call is there; expected tool_calls")
    # Parquet knows no missing fields: those of the other schema are null.
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    calls = calls_of(turn.get("tool_calls"))
    if calls and content is None:
        content = ""  # a turn may be nothing but calls
    message: Message = {"role": ROLES.get(role, role), "content": _content(content)}
    if calls:
        _text(json.dumps(calls), "tool_calls")
        message["tool_calls"] = calls
    if message["role"] == "tool":
        _add_names(message, turn)
    return message


def _content(value: Any) -> str:
    """The text of a message; text parts stand on lines of their own, as servers join them."""
    if not isinstance(value, list):
        return _text(value, "content")
    return _text("\n".join(map(_part, value)), "content")


def _part(part: Any) -> str:
    if not isinstance(part, Mapping):
        raise ValueError("content is not text")
    kind = part.get("type")
    if kind != "text":
        known = isinstance(kind, str) and kind in PARTS
        raise ValueError(f"content has {kind if known else 'a part that is unknown'}, not text")
    return _text(part.get("text"), "text of a content part")


def _add_names(message: Message, turn: Mapping[str, Any]) -> None:
    """Which call a tool's result answers, if the row says it."""
    if turn.get("tool_call_id") is not None:
        message["tool_call_id"] = _text(turn["tool_call_id"], "tool_call_id")
    if turn.get("name") is not None:
        message["name"] = _text(turn["name"], "name")


def _parse_instruction(row: Mapping[str, Any]) -> list[Conversation]:
    extra = _text(row.get("input") or "", "input")
    instruction = _text(row["instruction"], "instruction")
    prompt = instruction + (f"\n\n{extra}" if extra.strip() else "")
    return [messages_to_conversation(row, exchange(prompt, _text(row.get("output"), "output")))]


def tools_of(value: Any) -> tuple[Tool, ...]:
    """The tools of a row, which may be JSON text; none for None.

    Raises:
        ValueError: they are not a list of objects with a name.
    """
    value = _from_text(value, "tools are not JSON") if isinstance(value, str) else value
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise ValueError("tools is not a list of objects")
    tools = tuple(_plain(dict(tool)) for tool in value)
    if not all(isinstance(_function(tool).get("name"), str) for tool in tools):
        raise ValueError("a tool has no name")
    return tools


def calls_of(value: Any) -> list[Any]:
    """The `tool_calls` of a message, each with "type", "function" and, if it has one, "id".

    Arguments that are JSON text, as many services return them, become the object that templates
    write out.

    Raises:
        ValueError: they are not a list of calls, or a call has no name or unreadable arguments.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise ValueError("tool_calls is not a list of objects")
    return [_call(call) for call in value]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = _function(call)
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError("a tool call has no name")
    if isinstance(arguments, str):
        arguments = _from_text(arguments, "arguments of a tool call are not JSON")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError("arguments of a tool call are not an object")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    called = {"name": name, "arguments": _plain(dict(arguments))}
    return {**named, "type": "function", "function": called}


def _function(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function in a tool or call; some rows leave the wrapping out."""
    inner = holder.get("function")
    return inner if isinstance(inner, Mapping) else holder


def _from_text(text: str, says: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(says) from error


def _plain(value: Any) -> Any:
    """The value as JSON has it: Parquet also holds dates and bytes."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError("a tool is not JSON") from error


_PARSERS: dict[str, Callable[[Mapping[str, Any]], list[Conversation]]] = {
    "qa": _parse_qa,
    "messages": _parse_chat,
    "conversations": _parse_chat,
    "instruction": _parse_instruction,
}
