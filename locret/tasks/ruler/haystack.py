"""Running text and words for RULER's haystacks, from files or from installed packages."""

import importlib.util
import re
from pathlib import Path

from locret.tasks.base import TaskSettings
from locret.tasks.rows import read_contexts
from locret.tasks.synthetic import load_haystack

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's repeated filler."""

LISTS = {"adjective": "adjectivelist.txt", "noun": "nounlist.txt", "verb": "verblist.txt"}
"""Word lists of the package wonderwords by kind, the ones that RULER draws from."""

_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)\s+")


def essay_files(settings: TaskSettings) -> list[Path]:
    """The file of running text, if one was given under the name `haystack`.

    Raises:
        ValueError: it was given and is not there.
    """
    return [settings.file("haystack", "")] if settings.data.get("haystack") else []


def essay_words(settings: TaskSettings) -> list[str]:
    """Words of the haystack, in order: a text file's, those of a JSONL file's contexts, or the
    language reference that ships with CPython.

    Raises:
        ValueError: the file holds none, or a row that is no context.
    """
    files = essay_files(settings)
    if not files:
        return " ".join(load_haystack(None).sentences).split()
    name = files[0].name
    if name.endswith((".jsonl", ".jsonl.gz")):
        words = " ".join(row["context"] for row in read_contexts(files[0])).split()
    else:
        words = files[0].read_text(encoding="utf-8", errors="replace").split()
    if not words:
        raise ValueError(f"data 'haystack': {files[0]} holds no words; expected running text")
    return words


def sentences_of(words: list[str], count: int) -> list[str]:
    """Sentences of the first `count` words; the text repeats where it is shorter."""
    repeats = -(-count // len(words))
    return _SENTENCE_END.split(" ".join((words * repeats)[:count]))


def word_files(settings: TaskSettings) -> dict[str, Path]:
    """Files with one word a line, by kind: one given under the name `words`, else wonderwords'.

    Raises:
        ValueError: the file is missing, or the package is not installed.
    """
    if settings.data.get("words"):
        given = settings.file("words", "")
        return dict.fromkeys(LISTS, given)
    spec = importlib.util.find_spec("wonderwords")  # finds the package without running it
    if spec is None or spec.origin is None:
        raise ValueError(
            "this RULER task draws words from the package wonderwords, which is not installed: pip "
            "install 'locret[eval]', or give a file of words with --set data.words=PATH"
        )
    folder = Path(spec.origin).parent / "assets"
    return {kind: folder / name for kind, name in LISTS.items()}


def read_words(path: Path) -> list[str]:
    """The words of a file, sorted, each once."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return sorted({line.strip() for line in lines} - {""})
