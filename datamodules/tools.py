"""Tools that a conversation offers and calls, in the form that chat templates take.

    a tool     {"type": "function", "function": {"name", "description", "parameters"}}
    a call     {"type": "function", "id", "function": {"name", "arguments"}}
    a result   {"role": "tool", "tool_call_id", "content"}

Many templates write a conversation with tools and leave the tools out, without an error. So what a
template writes is tried on the conversation itself (`missing_from`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datamodules.conversations import Message, Tool

_CALL, _RESULT, _TOOL = "locretcall", "locretresult", "locrettool"
"""Names and texts that no conversation holds; a number follows."""

_TAKES_NO = {_CALL: "tool calls", _RESULT: "tool results", _TOOL: "tools"}


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


def missing_from(
    write: Callable[[Sequence[Message], Sequence[Tool]], str | None],
    messages: Sequence[Message],
    tools: Sequence[Tool],
) -> str | None:
    """What a chat template leaves out of a conversation with tools.

    Args:
        write: the text of messages and tools, or None if the template refuses them.

    Returns:
        "tool calls", "tool results" or "tools"; None if the template writes all of them.
    """
    marked, marked_tools, marks = _marked(messages, tools)
    if not marks:
        return None
    text = write(marked, marked_tools)
    lost = marks if text is None else [mark for mark in marks if mark not in text]
    return _TAKES_NO[lost[0].rstrip("-0123456789")] if lost else None


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


def _marked(
    messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[list[Message], list[Tool], list[str]]:
    """The conversation with a mark for each call, result and tool, and the marks in that order."""
    marks: dict[str, list[str]] = {_CALL: [], _RESULT: [], _TOOL: []}

    def mark(kind: str) -> str:
        marks[kind].append(f"{kind}-{len(marks[kind])}-")
        return marks[kind][-1]

    made: list[Message] = []
    for message in messages:
        copy = message.copy()
        if message["role"] == "tool":
            copy["content"] = mark(_RESULT)
        if message.get("tool_calls"):
            copy["tool_calls"] = [_renamed(call, mark(_CALL)) for call in message["tool_calls"]]
        made.append(copy)
    offered = [_renamed(tool, mark(_TOOL)) for tool in tools]
    return made, offered, [name for names in marks.values() for name in names]


def _renamed(holder: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tool or call under another name."""
    if isinstance(holder.get("function"), Mapping):
        return {**holder, "function": {**holder["function"], "name": name}}
    return {**holder, "name": name}
