"""Sources of texts, which need no answers: files, the Hub, or made on the spot.

A text is a conversation whose answer is blank: it gives a sample where the data module's `branches`
have "replay", and is skipped ("no answer") where they do not.

    data:
      branches: [replay]
      train:
        - class_path: datamodules.texts.TextSource
          init_args: {path: books, tokens: [512, 4096]}
        - class_path: datamodules.texts.GeneratedTexts
          init_args: {tokens: [512, 4096], size: 10000}
"""

import codecs
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation, SkippedRow, exchange
from datamodules.encoder import is_unicode
from datamodules.rows import MAX_CHARACTERS, Lines, ParquetTable, Table, TableConversations
from datamodules.sources import FileSource, HubSource, MadeSource, find_files, lengths, stem
from locret.tasks.texts import TEXTS

_BLOCK = 2**20  # bytes of a file that are one document: what is read to draw a window
_CONTINUED = bytes(range(0x80, 0xC0))  # bytes inside a character of UTF-8
_CHARACTERS = 6  # a token has fewer, in any text that is worth reading


class TextFiles(Table):
    """Files of text, each a row; one that is longer than a megabyte is several.

    Args:
        paths: of the files.
        field: what to call the text in a row.
    """

    name = "text"

    def __init__(self, paths: Sequence[str], field: str) -> None:
        self.paths = paths
        self.field = field
        self._blocks: list[tuple[str, int]] = []  # path, offset in bytes

    def scan(self) -> Iterator[tuple[str, int]]:
        self._blocks.clear()
        for path in self.paths:
            for offset in range(0, max(1, Path(path).stat().st_size), _BLOCK):
                self._blocks.append((path, offset))
                yield path, offset

    def raw(self, i: int) -> tuple[str, int]:
        return self._blocks[i]

    def row(self, raw: tuple[str, int]) -> Mapping[str, Any]:
        path, offset = raw
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(_BLOCK)
        if b"\0" in content:
            raise ValueError("a binary file")
        if offset:
            content = content.lstrip(_CONTINUED)
        try:
            # What is left of a character at the end belongs to the next block.
            return {self.field: codecs.getincrementaldecoder("utf-8-sig")().decode(content)}
        except UnicodeDecodeError as error:
            raise ValueError("not UTF-8") from error

    def place(self, i: int) -> str:
        path, offset = self._blocks[i]
        return f"{path}:{offset}" if offset else path


class TextSource(FileSource):
    """Windows of documents: text files, or a field of JSON lines and Parquet files.

    A document gives about as many windows as it has times `most` tokens, at places that are drawn,
    each in a stretch of its own. One with fewer than `least` tokens is skipped when it is drawn.

    Args:
        path: a file, a pattern in which `**` stands for any folders, or a folder, of which all
            files are taken but hidden ones, also those further down. `.jsonl`, `.jsonl.gz` and
            `.parquet` hold one document a row, any other file is a text in UTF-8.
        tokens: of a window, or the (least, most) to draw from evenly; a window has a few fewer.
        field: of a row, which holds the text.
        seed: another seed, other windows.
        limit: the most windows to take, from the first documents; None takes all.

    Raises:
        ValueError: lengths that are not 0 < least <= most, or a limit below 1.
    """

    def __init__(
        self,
        path: str,
        tokens: int | tuple[int, int],
        field: str = "text",
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(path, limit)
        self.tokens = lengths(tokens)
        self.field = field
        self.seed = seed
        self.expected = f"files of text in UTF-8, or rows with a text under {field!r}"

    def tables(self) -> Iterator[Table]:
        found = [path for path in find_files(self.path) if not self._is_hidden(path)]
        rows = [path for path in found if path.endswith((".jsonl", ".jsonl.gz", ".parquet"))]
        if texts := sorted({*found} - {*rows}):
            yield TextFiles(texts, self.field)
        for path in rows:
            if path.endswith(".parquet"):
                yield ParquetTable(path, stem(path), (self.field,))
            else:
                yield Lines(path, stem(path))

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """And refuse files without any text (ValueError)."""
        found = super().load(tokenizer)
        if not len(found):
            super().refuse(Counter())
        return found

    def refuse(self, before: "Counter[str]") -> None:
        pass  # a folder may hold rows of other kinds beside its texts

    def count(self, row: Mapping[str, Any]) -> int:
        return self.windows(self.text(row))

    def windows(self, document: str) -> int:
        """How many windows a document gives."""
        return max(1, len(document) // (4 * self.tokens[1]))

    def conversations(
        self, table: Table, index: "array[int]", tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Conversation]:
        return _Windows(self, table, index, tokenizer)

    def text(self, row: Mapping[str, Any]) -> str:
        """The document of a row.

        Raises:
            ValueError: there is none; the message is one of a few fixed texts.
        """
        found = row.get(self.field) if isinstance(row, Mapping) else None
        if not isinstance(found, str):
            raise ValueError("no text")
        if not found.strip():
            raise ValueError("an empty text")
        if len(found) > MAX_CHARACTERS:
            raise ValueError(f"text over {MAX_CHARACTERS} characters")
        if not is_unicode(found):
            raise ValueError("not valid Unicode")
        return found

    def _is_hidden(self, path: str) -> bool:
        inside = Path(path).relative_to(self.path) if Path(self.path).is_dir() else Path()
        return any(name.startswith(".") for name in inside.parts)


class HubTextSource(TextSource):
    """Windows of the documents of a data set of the Hugging Face Hub. Needs `datasets`.

    Args:
        name, split, revision, streaming: as in `datamodules.sources.HubSource`.
        tokens, field, seed, limit: as in `TextSource`.

    Raises:
        ValueError: as `TextSource`, and for streaming without a limit.
    """

    def __init__(
        self,
        name: str,
        tokens: int | tuple[int, int],
        field: str = "text",
        split: str = "train",
        seed: int = 0,
        limit: int | None = None,
        revision: str | None = None,
        streaming: bool = False,
    ) -> None:
        super().__init__(name, tokens, field, seed, limit)
        self._hub = HubSource(name, split, limit, revision, streaming)

    def __str__(self) -> str:
        return f"HubTextSource({self.path}, {self._hub.split})"

    def tables(self) -> Iterator[Table]:
        return self._hub.tables()


class _Windows(TableConversations):
    """The windows of a `TextSource`, cut for one tokenizer when asked for."""

    def __init__(
        self,
        source: TextSource,
        table: Table,
        index: "array[int]",
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__(table, index)
        self._source = source
        self._tokenizer = tokenizer

    def conversation(self, row: int, number: int) -> Conversation:
        place = f"{self.table.place(row)}#{number}"
        try:
            document = self._source.text(self.table.row(self.table.raw(row)))
        except (ValueError, OSError) as error:
            raise SkippedRow("changed while in use", place) from error
        least, most = self._source.tokens
        rng = Random(f"locret window {self._source.seed} {row} {number}")
        size = rng.randint(least, most)
        start = (number + rng.random()) / self._source.windows(document)
        piece = _from(document, start, size)
        text, tokens = fit(piece, size, self._tokenizer)
        if tokens < least and text == piece:
            raise SkippedRow("text shorter than the least length", place)
        name = self.table.name
        return _conversation(text, name, f"{name}:{row}#{number}", place)


class GeneratedTexts(MadeSource):
    """Texts of `locret.tasks.texts`.

    Args:
        tokens: of a text, or the (least, most) to draw from evenly; a text has a few fewer.
        size: number of texts.
        kinds: names in `locret.tasks.texts.TEXTS`, taken in turn; None takes all.
        seed: another seed, other texts.

    Raises:
        ValueError: for unknown kinds, lengths that are not 0 < least <= most, or size < 1.
    """

    def __init__(
        self,
        tokens: int | tuple[int, int],
        size: int,
        kinds: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.kinds = list(TEXTS) if kinds is None else list(kinds)
        if not self.kinds or set(self.kinds) - set(TEXTS):
            raise ValueError(f"kinds is {kinds}, expected some of {', '.join(TEXTS)}")
        super().__init__(tokens, size, seed)

    def __str__(self) -> str:
        kinds = "all kinds" if self.kinds == list(TEXTS) else ", ".join(self.kinds)
        return f"GeneratedTexts({kinds}, seed {self.seed})"

    def make(self, i: int, tokenizer: PreTrainedTokenizerBase) -> Conversation:
        rng = Random(f"locret text {self.seed} {i}")
        kind, size = self.kinds[i % len(self.kinds)], rng.randint(*self.tokens)
        # Vocabularies differ: some need fewer tokens than the text was made for.
        text, _ = fit(TEXTS[kind](rng, size * 14 // 10), size, tokenizer)
        return _conversation(text, f"texts/{kind}", f"{kind}:{self.seed}:{i}")


def _conversation(text: str, source: str, name: str, place: str = "") -> Conversation:
    """A text as a conversation that asks nothing about it."""
    return Conversation(exchange(text, ""), source, name, place, context=text)


def count(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a text has."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def fit(text: str, most: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """The beginning of a text, of close to and at most so many tokens; and how many it has."""
    while True:
        found = count(text, tokenizer)
        if found <= most:
            return text, found
        text = text[: int(len(text) * most / found * 0.998)]


def _from(document: str, start: float, tokens: int) -> str:
    """What has surely so many tokens, from a place (0 to 1) on, or from the next word there."""
    most = tokens * _CHARACTERS
    first = min(int(start * len(document)), max(0, len(document) - most))
    if first:
        spaces = (document.find(sign, first, first + 200) for sign in ("\n", " "))
        first = next((place + 1 for place in spaces if place >= 0), first)
    return document[first : first + most]
