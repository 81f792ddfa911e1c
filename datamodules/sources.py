"""Where conversations come from: files, the Hub, or made on the spot.

The constructor arguments of a source are its configuration; yaml fills them by class path:

    data:
      train:
        - class_path: datamodules.sources.JsonlSource
          init_args: {path: train.jsonl.gz}
        - class_path: datamodules.sources.SyntheticSource
          init_args: {tasks: [niah_single, passkey], tokens: [1024, 8192], size: 1000}
"""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Protocol, TextIO, runtime_checkable

from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation, Message
from locret.evaluation.synthetic import TASKS, make_sample, prompt_text

SCHEMAS = (
    '{"context", "qa": [{"question", "answers": [..]}]}, {"messages": [{"role", "content"}]}, '
    '{"conversations": [{"from", "value"}]} or {"instruction", "output"[, "input"]}'
)
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


@runtime_checkable
class Source(Protocol):
    """Anything that can list conversations. `str(source)` names it in reports."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """A sequence of conversations, the same at every call; items may be made when asked for.

        Raises:
            ValueError: if there is nothing usable.
        """
        ...


# ---- rows ----------------------------------------------------------------------------------------


def parse_row(row: Mapping[str, Any]) -> list[Conversation]:
    """The conversations of one row, of any schema in `SCHEMAS`; for "qa" rows one a question.

    A row's own "source" and "id" are taken over. A question without an answer gives a conversation
    whose answer is empty, which the encoder then skips and counts.

    Raises:
        ValueError: if the row has no schema that is known, or a field of the wrong kind.
    """
    if not isinstance(row, Mapping):
        raise ValueError("not an object")
    for key, parse in _PARSERS.items():
        if row.get(key) is not None:
            return parse(row)
    raise ValueError("unknown schema")


def _conversation(
    row: Mapping[str, Any], messages: Iterable[Message], part: str = ""
) -> Conversation:
    source, name = (str(row.get(key) or "") for key in ("source", "id"))
    return Conversation(tuple(messages), source, name + part)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field} is not text")
    return value


def _parse_qa(row: Mapping[str, Any]) -> list[Conversation]:
    context, qa = _text(row.get("context"), "context"), row["qa"]
    if not isinstance(qa, list) or not qa or not all(isinstance(item, Mapping) for item in qa):
        raise ValueError("qa is not a list of questions")
    return [_parse_question(row, context, item, f"#{i}") for i, item in enumerate(qa)]


def _parse_question(
    row: Mapping[str, Any], context: str, item: Mapping[str, Any], part: str
) -> Conversation:
    question, answers = _text(item.get("question") or "", "question"), item.get("answers") or [""]
    if not isinstance(answers, list):
        raise ValueError("answers is not a list")
    # Without a question the context is the whole prompt, and holds it already.
    prompt = f"{context}\n\n{question}" if question.strip() else context
    return _conversation(row, _exchange(prompt, _text(answers[0], "answer")), part)


def _exchange(prompt: str, answer: str) -> tuple[Message, Message]:
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}


def _parse_chat(row: Mapping[str, Any]) -> list[Conversation]:
    turns = row.get("messages") or row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("messages is not a list of turns")
    messages = [_parse_turn(turn) for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # a last question that nobody answered
    if not messages:
        raise ValueError("no message of the assistant")
    return [_conversation(row, messages)]


def _parse_turn(turn: Mapping[str, Any]) -> Message:
    role = _text(turn.get("role") or turn.get("from"), "role").lower()
    content = turn["content"] if "content" in turn else turn.get("value")
    return {"role": ROLES.get(role, role), "content": _text(content, "content")}


def _parse_instruction(row: Mapping[str, Any]) -> list[Conversation]:
    extra = _text(row.get("input") or "", "input")
    prompt = _text(row["instruction"], "instruction") + (f"\n\n{extra}" if extra.strip() else "")
    return [_conversation(row, _exchange(prompt, _text(row.get("output"), "output")))]


_PARSERS: dict[str, Callable[[Mapping[str, Any]], list[Conversation]]] = {
    "qa": _parse_qa,
    "messages": _parse_chat,
    "conversations": _parse_chat,
    "instruction": _parse_instruction,
}


class RowConversations(Sequence[Conversation]):
    """Conversations of rows, parsed when asked for.

    The questions of one context share its text this way, where one string each would hold a
    context of 16 KB forty times.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], index: list[tuple[int, int]], name: str):
        self._rows = rows
        self._index = index  # (row, conversation within the row)
        self._name = name

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Conversation:  # type: ignore[override]
        row, part = self._index[i]
        found = parse_row(self._rows[row])[part]
        id = found.id if found.id.partition("#")[0] else f"{self._name}:{row}{found.id}"
        return replace(found, source=found.source or self._name, id=id)


class _RowSource:
    """What sources of rows share: indexing, counting what is broken, refusing what is empty.

    Attributes:
        report: how many conversations were found, and how many rows were broken, by reason.
        first_broken: for each such reason, the place of the first row.
    """

    def __init__(self) -> None:
        self.report: Counter[str] = Counter()
        self.first_broken: dict[str, str] = {}

    def _index(
        self, rows: Iterable[tuple[str, Mapping[str, Any]]], limit: int | None
    ) -> list[tuple[int, int]]:
        """(row, part) of each conversation, at most `limit`; `rows` are (place, row)."""
        found = islice(self._parts(rows), limit)
        index = list(found)
        self.report["conversations"] = len(index)
        if not index:
            raise ValueError(
                f"{self} has no usable row; broken rows: {self._broken() or 'none, it is empty'}; "
                f"expected rows such as {SCHEMAS}"
            )
        return index

    def _parts(self, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[int, int]]:
        for i, (place, row) in enumerate(rows):
            try:
                n = len(parse_row(row))
            except ValueError as error:
                self._reject(str(error), place)
            else:
                yield from ((i, part) for part in range(n))

    def _reject(self, reason: str, place: str) -> None:
        self.report[reason] += 1
        self.first_broken.setdefault(reason, place)

    def _broken(self) -> str:
        return ", ".join(
            f"{self.report[reason]} x {reason} (first {place})"
            for reason, place in self.first_broken.items()
        )


class JsonlSource(_RowSource):
    """A file of JSON lines, gzipped if its name ends so.

    Args:
        path: `.jsonl` or `.jsonl.gz`; each row has one of the schemas in `SCHEMAS`.
        limit: the most conversations to take, from the start of the file; None takes all.
    """

    def __init__(self, path: str, limit: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.limit = _checked_limit(limit)

    def __str__(self) -> str:
        return f"JsonlSource({self.path})"

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """Read the file; see `Source.load`. Broken lines are counted in `report`.

        Raises:
            ValueError: if the file is missing or has no usable row.
        """
        if not Path(self.path).is_file():
            raise ValueError(
                f"{self.path!r} is not a file (working directory {Path.cwd()}); "
                "expected a .jsonl or .jsonl.gz file, so check the path"
            )
        self.report.clear()
        self.first_broken.clear()
        rows: list[Mapping[str, Any]] = []
        with _open(self.path) as file:
            index = self._index(self._read(file, rows), self.limit)
        return RowConversations(rows, index, Path(self.path).name.partition(".")[0])

    def _read(
        self, file: TextIO, rows: list[Mapping[str, Any]]
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Rows with their file:line; each is also kept in `rows`, for later parsing."""
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{self.path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                self._reject("not JSON", place)
            else:
                rows.append(row)
                yield place, row


class HubSource(_RowSource):
    """A data set of the Hugging Face Hub, such as `Yukang/LongAlpaca-12k`. Needs `datasets`.

    Args:
        name: `owner/name` on the Hub; a local folder in that form works too.
        split: the split to take.
        limit: the most conversations to take, from the start; None takes all.
        revision: a commit, tag or branch; give a commit to make a run reproducible.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        limit: int | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.split = split
        self.limit = _checked_limit(limit)
        self.revision = revision

    def __str__(self) -> str:
        return f"HubSource({self.name}, {self.split})"

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """Fetch the split; see `Source.load`. Broken rows are counted in `report`.

        Raises:
            ValueError: if no row is usable.
        """
        from datasets import load_dataset  # slow to import, and needed by this source alone

        rows = load_dataset(self.name, split=self.split, revision=self.revision)
        self.report.clear()
        self.first_broken.clear()
        placed = ((f"{self.name}:{i}", row) for i, row in enumerate(rows))
        return RowConversations(rows, self._index(placed, self.limit), self.name)


def _checked_limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1, or none to take everything")
    return limit


def _open(path: str) -> TextIO:
    # What is not UTF-8 becomes a broken character, not the end of the whole file.
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    return open(path, encoding="utf-8", errors="replace")


# ---- synthetic -----------------------------------------------------------------------------------


class SyntheticSource:
    """Synthetic tasks, made when asked for and the same for one index everywhere.

    Args:
        tasks: names in `locret.evaluation.synthetic.TASKS`, taken in turn.
        tokens: tokens of the user message, or the (least, most) of lengths to draw from evenly. The
            chat template comes on top: leave it room below the data module's max_prompt_tokens.
        size: number of samples.
        seed: another seed, other samples. Evaluation should use another one than training.
        haystack: path of a text file; None is the language reference that ships with CPython.

    Raises:
        ValueError: for no or unknown tasks, lengths that are not 0 < least <= most, or size < 1.
    """

    def __init__(
        self,
        tasks: list[str],
        tokens: int | tuple[int, int],
        size: int,
        seed: int = 0,
        haystack: str | None = None,
    ) -> None:
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not tasks:
            raise ValueError(f"tasks is {tasks}, expected some of {', '.join(TASKS)}")
        least, most = (tokens, tokens) if isinstance(tokens, int) else tokens
        if not 0 < least <= most or size < 1:
            raise ValueError(
                f"tokens is {tokens} and size is {size}; expected a length or (least, most), "
                "with 0 < least <= most, and a size of at least 1"
            )
        self.tasks = list(tasks)
        self.tokens = (least, most)
        self.size = size
        self.seed = seed
        self.haystack = haystack

    def __str__(self) -> str:
        return f"SyntheticSource({', '.join(self.tasks)}, seed {self.seed})"

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """See `Source.load`."""
        return SyntheticConversations(self, tokenizer)


class SyntheticConversations(Sequence[Conversation]):
    """The samples of a `SyntheticSource` for one tokenizer, a few milliseconds each."""

    def __init__(self, source: SyntheticSource, tokenizer: PreTrainedTokenizerBase) -> None:
        self._source = source
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return self._source.size

    def __getitem__(self, i: int) -> Conversation:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        source = self._source
        rng = Random(f"locret source {source.seed} {i}")
        task, tokens = source.tasks[i % len(source.tasks)], rng.randint(*source.tokens)
        seed = rng.getrandbits(63)
        sample = make_sample(task, tokens, self._tokenizer, seed, haystack=source.haystack)
        messages = _exchange(prompt_text(sample), sample.answer)
        return Conversation(messages, f"synthetic/{task}", f"{task}:{source.seed}:{i}")
