"""What needles are hidden in: sentences of noise, running text of a file, or CPython's language
reference (`pydoc_data.topics`); and files of words to draw from.
"""

import importlib.util
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from locret.tasks.base import TaskSettings, read_contexts

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""The haystack `noise`: the filler of the passkey test, and of RULER's niah_single_1 and vt."""

SENTENCE_CHARS = (24, 220)  # shorter is mostly debris, longer makes the prompt length coarse
MIN_SENTENCES = 8


Haystack = tuple[str, ...]
"""Sentences of prose, each one different from the others, in reading order."""


@lru_cache(maxsize=8)
def load_haystack(path: str | Path | None = None) -> Haystack:
    """Read a haystack: "noise", a UTF-8 text file, or CPython's language reference when None.

    The language reference differs between Python versions, so samples over it are reproducible
    within one version. ValueError if the file is missing or holds too few sentences.
    """
    if path is None:
        from pydoc_data.topics import topics  # 460 KB: loaded only by those who use it

        blocks = (b for name in sorted(topics) for b in re.split(r"\n\s*\n", topics[name]))
        return _sentences([_strip_markup(b) for b in blocks if _is_prose(b)])
    if path == "noise":
        return NOISE
    if not Path(path).is_file():
        raise ValueError(
            f"haystack {str(path)!r} is not a file; give the path of a text file, 'noise', or none "
            "for the language reference that ships with CPython"
        )
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    found = _sentences([" ".join(p.split()) for p in re.split(r"\n\s*\n", text)])
    if len(found) < MIN_SENTENCES:
        raise ValueError(
            f"haystack {str(path)!r} holds {len(found)} different sentences of "
            f"{SENTENCE_CHARS[0]} to {SENTENCE_CHARS[1]} characters, expected "
            f"at least {MIN_SENTENCES}; give a longer text"
        )
    return found


def _is_prose(block: str) -> bool:
    """Whether a block of the reference is no heading, grammar, code or footnote."""
    text = block.strip()
    if re.search(r"::|>>>|^\s*\.\.|[*=\-~^]{4,}|^\[\d+\]| \| |\n {8,}\S", text):
        return False
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return text[-1:] in ".:" and letters >= 0.85 * len(text)


def _strip_markup(block: str) -> str:
    text = " ".join(block.split()).removeprefix("* ")
    text = re.sub(r"\*{1,2}(\w[^*\"]*)\*{1,2}", r"\1", text)
    text = re.sub(r"\s*\[\d+\]", "", text)
    return text.translate(str.maketrans("“”‘’", "\"\"''", "`"))


def _sentences(paragraphs: Sequence[str]) -> Haystack:
    """Split into sentences; of equal ones the first stays, so that each has one place."""
    # A full stop after "e.g", "i.e", "etc", "vs" or an initial ends no sentence.
    not_end = r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bvs\.)(?<!\b[A-Z]\.)"
    end = not_end + r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])"
    low, high = SENTENCE_CHARS
    pieces = (s.strip() for p in paragraphs for s in re.split(end, p))
    return tuple(dict.fromkeys(s for s in pieces if low <= len(s) <= high and s[-1] in ".!?\"'"))


# ---- RULER's running text and words --------------------------------------------------------------

LISTS = {"adjective": "adjectivelist.txt", "noun": "nounlist.txt", "verb": "verblist.txt"}
"""Word lists of the package wonderwords by kind, the ones that RULER draws from."""

_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)\s+")


def essay_files(settings: TaskSettings) -> list[Path]:
    """The file of running text, if one was given under the name `haystack`."""
    return [settings.file("haystack", "")] if settings.data.get("haystack") else []


def essay_words(settings: TaskSettings) -> list[str]:
    """Words of the haystack, in order: a text file's, those of a JSONL file's contexts, or the
    language reference that ships with CPython."""
    files = essay_files(settings)
    if not files:
        return " ".join(load_haystack(None)).split()
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
    """Files with one word a line, by kind: one given under the name `words`, else wonderwords'."""
    if settings.data.get("words"):
        given = settings.file("words", "")
        return dict.fromkeys(LISTS, given)
    spec = importlib.util.find_spec("wonderwords")  # finds the package without running it
    if spec is None or spec.origin is None:
        raise ValueError(
            "this RULER task draws words from the package wonderwords, which is not installed: pip "
            "install 'locret[eval]', or give a file of words with --data.words PATH"
        )
    folder = Path(spec.origin).parent / "assets"
    return {kind: folder / name for kind, name in LISTS.items()}


def read_words(path: Path) -> list[str]:
    """The words of a file, sorted, each once."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return sorted({line.strip() for line in lines} - {""})
