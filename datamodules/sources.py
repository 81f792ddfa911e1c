"""Where conversations come from: files, the Hub, or made on the spot.

The constructor arguments of a source are its configuration; yaml fills them by class path:

    data:
      train:
        - class_path: datamodules.sources.JsonlSource
          init_args: {path: train.jsonl.gz}
        - class_path: datamodules.sources.SyntheticSource
          init_args: {tasks: [niah_single, passkey], tokens: [1024, 8192], size: 1000}
"""

import copy
import glob
import zlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation, SkippedRow, exchange
from datamodules.rows import (
    SCHEMAS,
    Lines,
    ObjectTable,
    ParquetTable,
    Table,
    TableConversations,
    parse_row,
)
from locret.quantities import check_bounds, check_whole
from locret.tasks.synthetic import TASKS, make_sample, prompt_text


@runtime_checkable
class Source(Protocol):
    """Anything that can list conversations. `str(source)` names it in reports."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """A sequence of conversations, the same at every call; items may be made when asked for.

        Raises:
            ValueError: if there is nothing usable.
        """
        ...


class TableSource(ABC):
    """What sources of rows share: indexing, counting what is broken, refusing what is empty.

    Args:
        limit: the most conversations to take, from the start; None takes all.

    Attributes:
        report: "rows" read, "conversations" found, and broken rows by reason.
        first_broken: for each such reason, the place of the first row.
        expected: what messages say that rows should be.

    Raises:
        ValueError: for a limit below 1.
    """

    expected = f"rows such as {SCHEMAS}"

    def __init__(self, limit: int | None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}, expected at least 1, or none to take everything")
        self.limit = limit
        self.report: Counter[str] = Counter()
        self.first_broken: dict[str, str] = {}

    @abstractmethod
    def tables(self) -> Iterator[Table]:
        """The tables to read, in order, each made when the ones before it have been read.

        Raises:
            ValueError: if no file is there, or one cannot be read as asked for.
        """

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """Read the tables through; see `Source.load`. Broken rows are counted in `report`.

        Raises:
            ValueError: if a table is missing, cannot be read, or has no usable row.
        """
        self.report.clear()
        self.first_broken.clear()
        found: list[Sequence[Conversation]] = []
        for table in self.tables():
            left = None if self.limit is None else self.limit - self.report["conversations"]
            found.append(self.conversations(table, self._index(table, left), tokenizer))
            self.report["conversations"] += len(found[-1])
            if left == len(found[-1]):
                break
        return ConcatDataset(found)  # type: ignore[return-value,arg-type]

    def count(self, row: Mapping[str, Any]) -> int:
        """How many conversations a row holds. ValueError: it is broken, in one of a few texts."""
        return len(parse_row(row))

    def conversations(
        self, table: Table, index: "array[int]", tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Conversation]:
        """The conversations of a table that has been read; `index` as in `TableConversations`."""
        return TableConversations(table, index)

    def _index(self, table: Table, limit: int | None) -> "array[int]":
        """(row, number within it) of each conversation, alternating, at most `limit` of them."""
        index = array("q")
        before = Counter(self.report)
        try:
            for i, raw in enumerate(table.scan()):
                self.report["rows"] += 1
                for number in range(self._conversations(table, i, raw)):
                    index.extend((i, number))
                    if len(index) // 2 == limit:
                        return index
        except (OSError, EOFError, zlib.error, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{self} cannot be read to its end: {error} (at row {self.report['rows']}); "
                "check that the file is complete and of the kind that its name says"
            ) from error
        if not index:
            self.refuse(before)
        return index

    def _conversations(self, table: Table, i: int, raw: object) -> int:
        """How many conversations row i holds; a broken one is counted and holds none."""
        try:
            return self.count(table.row(raw))
        except ValueError as error:
            self.report[str(error)] += 1
            self.first_broken.setdefault(str(error), table.place(i))
            return 0

    def refuse(self, before: "Counter[str]") -> None:
        """Say that a table has no usable row; `before` is the report without it."""
        broken = ", ".join(
            f"{count} x {reason} (first {self.first_broken[reason]})"
            for reason, count in (self.report - before).items()
            if reason in self.first_broken
        )
        raise ValueError(
            f"{self} has no usable row; broken rows: {broken or 'none, it is empty'}; "
            f"expected {self.expected}"
        )


class FileSource(TableSource):
    """What sources of files share: `path` is for `find_files`."""

    def __init__(self, path: str, limit: int | None) -> None:
        super().__init__(limit)
        self.path = path

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.path})"


class JsonlSource(FileSource):
    """Files of JSON lines in UTF-8, gzipped if their names end so.

    Args:
        path: a `.jsonl` or `.jsonl.gz` file, a pattern with `*`, or a folder, of which all such
            files are taken, also those further down; in the order of their paths. Each row has one
            of the schemas in `datamodules.rows.SCHEMAS`.
        limit: the most conversations to take, from the start; None takes all.
        streaming: leave the rows on disk and read each when it is drawn, for files that are larger
            than the memory. They are still read through once at the start. Not for gzipped files.
    """

    def __init__(self, path: str, limit: int | None = None, streaming: bool = False) -> None:
        super().__init__(path, limit)
        self.streaming = streaming

    def tables(self) -> Iterator[Table]:
        for path in find_files(self.path, (".jsonl", ".jsonl.gz")):
            yield Lines(path, stem(path), self.streaming)


class ParquetSource(FileSource):
    """Parquet files. Needs `pyarrow`, which comes with `datasets`.

    Args:
        path: a `.parquet` file, a pattern or a folder, as in `JsonlSource`; the same schemas.
        limit: the most conversations to take, from the start; None takes all.
    """

    def __init__(self, path: str, limit: int | None = None) -> None:
        super().__init__(path, limit)

    def tables(self) -> Iterator[Table]:
        for path in find_files(self.path, (".parquet",)):
            yield ParquetTable(path, stem(path))


class HubSource(TableSource):
    """A data set of the Hugging Face Hub, such as `Yukang/LongAlpaca-12k`. Needs `datasets`.

    Args:
        name: `owner/name` on the Hub; a local folder in that form works too.
        split: the split to take.
        limit: the most conversations to take, from the start; None takes all.
        revision: a commit, tag or branch; give a commit to make a run reproducible.
        streaming: fetch no more than the first `limit` conversations, and hold them in memory, in
            place of downloading the whole data set.

    Raises:
        ValueError: for streaming without a limit.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        limit: int | None = None,
        revision: str | None = None,
        streaming: bool = False,
    ) -> None:
        super().__init__(limit)
        if streaming and limit is None:
            raise ValueError(
                f"streaming {name} needs a limit: an epoch is shuffled, so what it draws from has "
                "to be known; set limit, or leave streaming off to download the whole"
            )
        self.name = name
        self.split = split
        self.revision = revision
        self.streaming = streaming

    def __str__(self) -> str:
        return f"HubSource({self.name}, {self.split})"

    def tables(self) -> Iterator[Table]:
        """See `TableSource.tables`. Errors of the Hub are those of `datasets`."""
        from datasets import load_dataset  # slow to import, and needed by this source alone

        options = {"streaming": True} if self.streaming else {}
        rows = load_dataset(self.name, split=self.split, revision=self.revision, **options)
        yield ObjectTable(rows, self.name, keep=self.streaming)


def find_files(path: str, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """The file, those of a folder and the ones below it, or those that a pattern matches; sorted.

    Args:
        path: a file of any name, a folder, or a pattern in which `**` stands for any folders.
        suffixes: of the files to take from a folder; all of them if none are given.

    Raises:
        ValueError: if there is none.
    """
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        found = [str(file) for file in Path(path).rglob("*") if file.name.endswith(suffixes)]
    else:
        found = glob.glob(path, recursive=True)
    files = sorted(file for file in found if Path(file).is_file())
    if not files:
        expected = " or ".join(suffixes) or "files of text"
        raise ValueError(
            f"{path!r} is not a file (working directory {Path.cwd()}), nor a folder or a pattern "
            f"with files in it; expected {expected}, so check the path"
        )
    return files


def stem(path: str) -> str:
    """The name of a file up to its first dot."""
    return Path(path).name.partition(".")[0]


def lengths(tokens: int | tuple[int, int], least: int = 1) -> tuple[int, int]:
    """The (least, most) tokens of a source. ValueError: they are below `least` or out of order."""
    bounds = (tokens, tokens) if isinstance(tokens, int) else tokens
    check_bounds("tokens", bounds, least)
    return bounds[0], bounds[1]


class MadeSource(Sequence[Conversation], ABC):
    """Conversations that are made when asked for, the same for one index everywhere.

    Args:
        tokens: of one, or the (least, most) to draw from evenly.
        size: number of conversations.
        seed: another seed, other conversations.
        least: bound on the tokens.

    Raises:
        ValueError: for lengths that are not `least` <= least <= most, or size < 1.
    """

    def __init__(self, tokens: int | tuple[int, int], size: int, seed: int, least: int = 1) -> None:
        self.tokens = lengths(tokens, least)
        check_whole("size", size, 1)
        self.size = size
        self.seed = seed
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @abstractmethod
    def make(self, i: int, tokenizer: PreTrainedTokenizerBase) -> Conversation:
        """Conversation `i`; SkippedRow if there is none."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """See `Source.load`."""
        loaded = copy.copy(self)  # another tokenizer makes others
        loaded._tokenizer = tokenizer
        return loaded

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Conversation:  # type: ignore[override]
        i = range(len(self))[i]
        assert self._tokenizer is not None
        return self.make(i, self._tokenizer)


PROBES = 8  # samples of a task tried at the least length: how much text they need differs


class SyntheticSource(MadeSource):
    """Synthetic tasks, a few milliseconds each.

    A rare sample that needs more tokens than all that were tried raises SkippedRow.

    Args:
        tasks: names in `locret.tasks.synthetic.TASKS`, taken in turn.
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
        super().__init__(tokens, size, seed)
        self.tasks = list(tasks)
        self.haystack = haystack

    def __str__(self) -> str:
        return f"SyntheticSource({', '.join(self.tasks)}, seed {self.seed})"

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """And try each task: ValueError for a haystack or a least length that does not do."""
        least, _ = self.tokens
        for task in dict.fromkeys(self.tasks):
            for seed in range(PROBES):
                try:
                    make_sample(task, least, tokenizer, seed, haystack=self.haystack)
                except ValueError as error:
                    raise ValueError(f"{self}: no sample of {task} can be made: {error}") from error
        return super().load(tokenizer)

    def make(self, i: int, tokenizer: PreTrainedTokenizerBase) -> Conversation:
        rng = Random(f"locret source {self.seed} {i}")
        task, tokens = self.tasks[i % len(self.tasks)], rng.randint(*self.tokens)
        seed = rng.getrandbits(63)
        name = f"{task}:{self.seed}:{i}"
        try:
            sample = make_sample(task, tokens, tokenizer, seed, haystack=self.haystack)
        except ValueError as error:
            raise SkippedRow("tokens too few for the task", name) from error
        messages = exchange(prompt_text(sample), sample.answer)
        return Conversation(messages, f"synthetic/{task}", name, context=sample.context)
