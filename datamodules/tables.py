"""Where rows lie: lines of a file, a Parquet file, a data set of the Hub.

A table is read through once, which says what is broken and remembers where the rest is; after that
its rows are fetched by number. A row is parsed whenever it is asked for, so that what is in memory
is as compact as it can be: the lines themselves, their offsets in the file, or Arrow's table.
"""

import gzip
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from datamodules.conversations import (
    FIELDS,
    MAX_CHARACTERS,
    Conversation,
    SkippedRow,
    parse_row,
)

_MAX_LINE = 4 * MAX_CHARACTERS  # bytes; what is longer is not even looked at


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
        self._table = table
        self._index = index

    def __len__(self) -> int:
        return len(self._index) // 2

    def __getitem__(self, i: int) -> Conversation:  # type: ignore[override]
        i = range(len(self))[i]
        row, number = self._index[2 * i], self._index[2 * i + 1]
        table = self._table
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
