"""Rows that hold conversations: their schemas, and where they lie.

A table is lines of a file, a Parquet file or a data set of the Hub. It is read through once, which
says what is broken and remembers where the rest is; after that its rows are fetched by number. A
row is parsed whenever it is asked for, so that what is in memory is as compact as it can be: the
lines themselves, their offsets in the file, or Arrow's table.
"""

import gzip
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from datamodules.conversations import Conversation, Message, SkippedRow, Tool, exchange

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
_MAX_LINE = 4 * MAX_CHARACTERS  # bytes; what is longer is not even looked at


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


def _conversation(
    row: Mapping[str, Any], messages: Iterable[Message], number: str = ""
) -> Conversation:
    """With the row's "source", "id" and "tools"; `number` is appended to the id."""
    source, name = (_name(row.get(key)) for key in ("source", "id"))
    tools = _tools(row.get("tools"))
    _text(json.dumps(tools), "tools")
    return Conversation(tuple(messages), source, name + number, tools=tools)


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
    questions = tuple(map(_parse_question, _objects(qa, "qa", "questions")))
    if not questions:
        raise ValueError("qa is not a list of questions")
    return [
        replace(
            _conversation(row, exchange(context + question, answer), f"#{i}"),
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
    messages = [_parse_turn(turn) for turn in _objects(turns, "messages", "turns")]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # a last question that nobody answered
    if not messages:
        raise ValueError("no message of the assistant")
    return [_conversation(row, messages)]


def _parse_turn(turn: Mapping[str, Any]) -> Message:
    role = _text(turn.get("role") or turn.get("from"), "role").lower()
    if turn.get("function_call") is not None:
        raise ValueError("function_call is there; expected tool_calls")
    # Parquet knows no missing fields: those of the other schema are null.
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    calls = [_call(call) for call in _objects(turn.get("tool_calls"), "tool_calls")]
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
    return [_conversation(row, exchange(prompt, _text(row.get("output"), "output")))]


def _objects(value: Any, field: str, what: str = "objects") -> list[Mapping[str, Any]]:
    """A field's list of objects; none for None."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"{field} is not a list of {what}")
    return value


def _tools(value: Any) -> tuple[Tool, ...]:
    """The tools of a row, which may be JSON text."""
    value = _from_text(value, "tools are not JSON") if isinstance(value, str) else value
    tools = tuple(_plain(dict(tool)) for tool in _objects(value, "tools"))
    if not all(isinstance(_function(tool).get("name"), str) for tool in tools):
        raise ValueError("a tool has no name")
    return tools


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with "type", "function" and, if it has one, "id".

    Arguments that are JSON text, as many services return them, become the object that templates
    write out.
    """
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


# ---- where rows lie ------------------------------------------------------------------------------


class Table(ABC):
    """Rows by number."""

    name: str  # short, for the conversations that have no name of their own

    @abstractmethod
    def scan(self) -> Iterator[Any]:
        """Read it through: row 0, 1, ... in raw form, each remembered before it is yielded."""

    @abstractmethod
    def raw(self, i: int) -> Any:
        """Row i in raw form, once it has been scanned."""

    @abstractmethod
    def row(self, raw: Any) -> Mapping[str, Any]:
        """The row, of whatever kind it turns out to be.

        Raises:
            ValueError: if it cannot be read; the message is one of a few fixed texts.
        """

    @abstractmethod
    def place(self, i: int) -> str:
        """Where row i is, for people."""


class Lines(Table):
    """The lines of a JSON lines file; blank ones are no rows.

    Args:
        path: gzipped if it ends in .gz.
        name: of the table.
        streaming: leave the lines on disk, for 16 bytes of memory a line; else they are kept.

    Raises:
        ValueError: a gzipped file, which has no offsets to go to, is to be streamed.
    """

    def __init__(self, path: str, name: str, streaming: bool = False) -> None:
        if streaming and path.endswith(".gz"):
            raise ValueError(
                f"{path} is gzipped, and a compressed file cannot be read from the middle; "
                "unpack it, or leave streaming off"
            )
        self.path = path
        self.name = name
        self.streaming = streaming
        self._kept: Any = array("q") if streaming else []  # offsets, or lines
        self._numbers = array("q")

    def scan(self) -> Iterator[bytes | None]:
        del self._kept[:], self._numbers[:]
        with _open(self.path) as file:
            for number, offset, line in _read_lines(file):
                self._numbers.append(number)
                self._kept.append(offset if self.streaming else line)
                yield line

    def raw(self, i: int) -> bytes | None:
        if not self.streaming:
            return self._kept[i]
        # Opened anew, for processes that share an open file share its position.
        with open(self.path, "rb") as file:
            file.seek(self._kept[i])
            return file.readline(_MAX_LINE)

    def row(self, raw: bytes | None) -> Mapping[str, Any]:
        if raw is None:
            raise ValueError(f"line over {_MAX_LINE} bytes")
        try:
            return json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError("not UTF-8") from error
        except (ValueError, RecursionError) as error:  # also numbers and nesting beyond Python
            raise ValueError("not JSON") from error

    def place(self, i: int) -> str:
        return f"{self.path}:{self._numbers[i]}"


class ParquetTable(Table):
    """A Parquet file, kept in memory as Arrow has it. Needs `pyarrow`.

    Args:
        path: of the file.
        name: of the table.
        fields: those to read, where the file has them.
    """

    def __init__(self, path: str, name: str, fields: Sequence[str] = FIELDS) -> None:
        self.path = path
        self.name = name
        self.fields = fields
        self._table: Any = None

    def scan(self) -> Iterator[Any]:
        import pyarrow.parquet  # slow to import, and needed by this table alone

        file = pyarrow.parquet.ParquetFile(self.path)
        known = [field for field in file.schema_arrow.names if field in self.fields]
        self._table = file.read(columns=known)
        return map(self.raw, range(self._table.num_rows))

    def raw(self, i: int) -> Any:
        return self._table.slice(i, 1)

    def row(self, raw: Any) -> Mapping[str, Any]:
        try:
            return raw.to_pylist()[0]
        except UnicodeDecodeError as error:
            raise ValueError("not UTF-8") from error

    def place(self, i: int) -> str:
        return f"{self.path}:{i}"


class ObjectTable(Table):
    """Rows that are Python objects already.

    Args:
        rows: to go through once, and to fetch from by number.
        name: of the table, and of its places.
        keep: keep the rows as they come, for what cannot be fetched from by number.
    """

    def __init__(self, rows: Iterable[Any], name: str, keep: bool = False) -> None:
        self.name = name
        self._rows = rows
        self._kept: Any = [] if keep else rows

    def scan(self) -> Iterator[Any]:
        for row in self._rows:
            if self._kept is not self._rows:
                self._kept.append(row)
            yield row

    def raw(self, i: int) -> Any:
        return self._kept[i]

    def row(self, raw: Any) -> Mapping[str, Any]:
        return raw

    def place(self, i: int) -> str:
        return f"{self.name}:{i}"


class TableConversations(Sequence[Conversation]):
    """Conversations of a table, parsed when asked for.

    The questions of one context share its text this way, where one string each would hold a
    context of 16 KB forty times.

    Args:
        table: scanned.
        index: row numbers of the conversations, and their numbers within the row, alternating.
    """

    def __init__(self, table: Table, index: "array[int]") -> None:
        self.table = table
        self._index = index

    def __len__(self) -> int:
        return len(self._index) // 2

    def __getitem__(self, i: int) -> Conversation:  # type: ignore[override]
        i = range(len(self))[i]
        return self.conversation(self._index[2 * i], self._index[2 * i + 1])

    def conversation(self, row: int, number: int) -> Conversation:
        """Conversation `number` of a row; SkippedRow if it can no longer be read."""
        table = self.table
        try:
            siblings = parse_row(table.row(table.raw(row)))
            found = siblings[number]
        except (ValueError, IndexError) as error:
            raise SkippedRow("changed while in use", table.place(row)) from error
        return replace(
            found,
            source=found.source or table.name,
            id=found.id if found.id.partition("#")[0] else f"{table.name}:{row}{found.id}",
            place=table.place(row) + (f"#{number}" if len(siblings) > 1 else ""),
        )


def _open(path: str) -> BinaryIO:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore


def _read_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
    """(line number from 1, byte offset, line) of the lines that are not blank; None: too long."""
    number = offset = 0
    while line := file.readline(_MAX_LINE):
        number, start, long = number + 1, offset, False
        offset += len(line)
        while not line.endswith(b"\n") and (rest := file.readline(_MAX_LINE)):
            long, line = True, rest
            offset += len(rest)
        if long:
            yield number, start, None
        elif line.strip():
            yield number, start, line
