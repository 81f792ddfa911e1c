"""What an evaluation task is: samples with their context apart from their question, and a score.

A sample's user turn is `context + question`, exactly as the benchmark words it; the cut between the
two is what the query-agnostic protocol needs. `answer_prefix` is given to the model as the first
words of its answer.

Data files are JSON Lines, plain or gzipped; what is wrong names the file and the line. Contexts
with their questions are rows `{"id", "context", "qa": [{"question", "answers"}]}`.
"""

import gzip
import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from locret.system.files import file_hash, write_whole
from locret.tasks.metrics import check_rouge


class Prompts(Protocol):
    """How samples become prompts: what generated ones are made and measured with."""

    tokenizer: Any

    @property
    def fingerprint(self) -> str:
        """Recognises the tokenizer and its template."""
        ...

    def measure(self, sample: "Sample") -> int:
        """Tokens of the sample's rendered prompt."""
        ...


@dataclass(frozen=True)
class Sample:
    """One question about one context.

    Attributes:
        id: unique within its task.
        context: read first; ends where the question begins.
        question: the rest of the user turn, white space before it included.
        answers: the references.
        answer_prefix: the answer's first words, given to the model.
        group: samples of one group are about the same context; empty = a context of its own.
        depth: where in the context the answer stands, 0 = start and 1 = end; None = not told.
        extra: what the task's score needs beside the answers.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    answer_prefix: str = ""
    group: str = ""
    depth: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def in_turns(samples: Iterable[Sample]) -> list[Sample]:
    """The first question about every context, then the second about every one, and so on."""
    asked: Counter[str] = Counter()
    turns: list[tuple[int, Sample]] = []
    for sample in samples:
        context = sample.group or sample.id
        turns.append((asked[context], sample))
        asked[context] += 1
    # Sorting is stable: contexts stay in order.
    return [sample for _, sample in sorted(turns, key=lambda turn: turn[0])]


@dataclass(frozen=True)
class TaskSettings:
    """Where a task finds its data and how much of it there shall be.

    Attributes:
        data_dir: folder of the data files that are not given by path.
        data: paths by name, such as `squad` or `haystack`; relative ones are within `data_dir`.
        length: tokens of a prompt and its answer, for tasks that are made to a length.
        depths: at which the needles of `locret.tasks.synthetic` stand, spread evenly.
        max_new_tokens: of an answer; None = as the task has it.
        seed: of generated samples.
        cache_dir: where generated samples are kept; None = nowhere.
    """

    data_dir: Path | None = None
    data: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    depths: int = 10
    max_new_tokens: int | None = None
    seed: int = 42
    cache_dir: Path | None = None

    def file(self, name: str, default: str) -> Path:
        """The file for the data `name`, whose usual name in `data_dir` is `default`; ValueError if
        it is not there."""
        given = Path(self.data.get(name, default)).expanduser()
        if self.data_dir is not None and not given.is_absolute() and not given.is_file():
            given = self.data_dir / given
        if not given.is_file():
            raise ValueError(
                f"data {name!r}: {given} is not a file; give its folder with --data-dir, or its "
                f"path with --data.{name} PATH"
            )
        return given


NAMED: "list[type[Task]]" = []
"""Every class of a task that has a name, as they are defined."""


class Task(ABC):
    """A named set of samples and how an answer is scored.

    A class with a `name`, in any file of this folder, is asked for by that name.

    Attributes:
        name: as asked for.
        group: a name that stands for all tasks that give it, if they are several.
        data: usual names of its data files in `data_dir`, by the names that other ones are given
            by; "" = none is needed.
        metrics: names of the scores of a sample, the main one first; higher = better, 0 to 1.
        max_new_tokens: of an answer.
        stop: an answer ends before the first of these strings, or at the end of the turn.
        length: tokens that prompts were made for; None = as the data has them.
        version: changes when the samples change, so that stored predictions are not taken over.
    """

    name: ClassVar[str]
    group: ClassVar[str] = ""
    data: ClassVar[Mapping[str, str]] = {}
    metrics: ClassVar[tuple[str, ...]]
    max_new_tokens: int
    stop: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1
    length: int | None = None

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            NAMED.append(cls)

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings
        if settings.max_new_tokens is not None:
            self.max_new_tokens = settings.max_new_tokens

    @property
    def label(self) -> str:
        """Name and length: what tells this task from the others of a run."""
        return self.name if self.length is None else f"{self.name}@{self.length}"

    def files(self) -> list[Path]:
        """The data files that are read; ValueError where one is missing: which, and where to put
        it."""
        return [self.settings.file(name, usual) for name, usual in self.data.items() if usual]

    def origins(self) -> dict[str, str]:
        """What samples are made of, by name: the data files, each with the hash of its content."""
        return {path.name: file_hash(path) for path in self.files()}

    def check_packages(self) -> None:
        """Raises ValueError where a package that the scores need is not installed; says which."""
        if any(name.startswith("rouge") for name in self.metrics):
            check_rouge()

    @abstractmethod
    def samples(self, limit: int | None, prompts: Prompts | None) -> list[Sample]:
        """The first `limit` samples, or all. The same ones first, however many are asked for.

        Args:
            limit: None = all there are.
            prompts: for tasks that are made to a length; the others may do without.
        """

    @abstractmethod
    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        """The scores of an answer, by `metrics`."""


class SizedTask(Task):
    """A task whose prompts are made to a length, 4,096 tokens unless the settings give another."""

    length: int = 4096

    def __init__(self, settings: TaskSettings) -> None:
        super().__init__(settings)
        self.length = settings.length or self.length


DEFAULT_SAMPLES = 500


class MadeTask(SizedTask):
    """A task whose prompt, chat template and answer fit `length` tokens; made samples are kept."""

    @abstractmethod
    def made(self, count: int, prompts: Prompts) -> list[Sample]:
        """The first `count` samples, or as many as there are."""

    def samples(self, limit: int | None, prompts: Prompts | None) -> list[Sample]:
        assert prompts is not None
        count = DEFAULT_SAMPLES if limit is None else limit
        if self.settings.cache_dir is None:
            return self.made(count, prompts)
        path = self._path(self.settings.cache_dir, prompts.fingerprint)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ["0"]
        if int(lines[0]) >= count:
            return [_sample(line) for line in lines[1:]][:count]
        samples = self.made(count, prompts)
        rows = [str(count), *(json.dumps(asdict(sample)) for sample in samples)]
        write_whole(path, "\n".join(rows) + "\n")
        return samples

    def _path(self, folder: Path, fingerprint: str) -> Path:
        depends_on: dict[str, Any] = {
            "version": self.version,
            "seed": self.settings.seed,
            "tokenizer": fingerprint,
            "files": list(self.origins().values()),
        }
        if self.settings.max_new_tokens is not None:
            depends_on["max_new_tokens"] = self.settings.max_new_tokens  # a part of the length
        key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
        return folder / "samples" / f"{self.name}-{self.length}-{key}.jsonl"

    def does_not_fit(self) -> ValueError:
        return ValueError(
            f"{self.name} does not fit {self.length} tokens with {self.max_new_tokens} for the "
            "answer; ask for a larger length"
        )


def _sample(line: str) -> Sample:
    row = json.loads(line)
    return Sample(**row | {"answers": tuple(row["answers"])})


# ---- data files ----------------------------------------------------------------------------------


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with where it stands (`FILE:LINE`); empty lines are skipped. ValueError if the file
    cannot be read, or a line is no JSON object."""
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _row(line, f"{path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON Lines: {error}") from error


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} holds a {type(row).__name__}; expected an object")
    return row


def are_texts(value: Any) -> bool:
    """Whether this is a list of texts, at least one. A text alone would be read by its letters."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def read_contexts(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, in order, each with an `id`; ValueError for a line that is no such
    row."""
    for number, (where, row) in enumerate(read_rows(path)):
        asked = row.get("qa")
        right = isinstance(asked, list) and all(
            isinstance(qa, dict)
            and isinstance(qa.get("question"), str)
            and are_texts(qa.get("answers"))
            for qa in asked
        )
        if not right or not isinstance(row.get("context"), str):
            raise ValueError(
                f'{where} has no "context" with a list "qa" of questions and answers; expected '
                '{"id", "context", "qa": [{"question", "answers": ["text", ...]}]}'
            )
        yield {"id": str(number)} | row
