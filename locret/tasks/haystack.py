"""What needles are hidden in, and how they are worded.

A haystack is sentences of noise, running text of a file, or CPython's language reference
(`pydoc_data.topics`). The wording of needles and of chains of variables is RULER's: its own tasks
(`locret.tasks.ruler`) and those that heads are trained on (`locret.tasks.synthetic`) ask in these
words. What differs between the two is named in braces.
"""

import importlib.util
import re
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TypeVar

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


# ---- needles and chains of variables -------------------------------------------------------------

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NEEDLE_INTRO = (
    "{Some} special magic {kind} {are} hidden within the following text. Make sure to memorize "
    "{it}. I will quiz you about the {kind} afterwards."
)
NEEDLE_QUESTION = (
    "What {are_all} the special magic {kind} for {keys} mentioned in the provided text?"
)
NEEDLE_ANSWER = "The special magic {kind} for {keys} mentioned in the provided text {are}"
ONE = {"Some": "A", "are": "is", "are_all": "is"}
MANY = {"Some": "Some", "are": "are", "are_all": "are all"}

CHAIN_INTRO = "Memorize and track the chain(s) of variable assignment hidden in {this} text."
CHAIN_QUESTION = "Find all variables that are assigned the value {value} in the text above."
CHAIN_ANSWER = (
    "According to the chain(s) of variable assignment in the text above, {count} variables are "
    "{assigned} the value {value}, they are:"
)
VARIABLES = 5  # of one chain: four hops

T = TypeVar("T")


def listing(items: Sequence[str]) -> str:
    """`a`, or `a, and b`, or `a, b, and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def needle_words(kinds: str, keys: Sequence[str], single: bool) -> dict[str, str]:
    """What fills question and answer when values of these kinds are asked for, or a single one."""
    kind = kinds.removesuffix("s") if single else kinds
    return (ONE if single else MANY) | {"kind": kind, "keys": listing(keys)}


def assignments(names: Sequence[str], value: str) -> list[str]:
    """The first name gets the value, each other one the name before it."""
    sources = [value, *(f"VAR {name}" for name in names)]
    return [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]


def random_number(rng: Random, digits: int) -> str:
    """A number of so many digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def random_key(rng: Random, adjectives: Sequence[str], nouns: Sequence[str]) -> str:
    """Two words that no text holds side by side."""
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def made_up_words(
    rng: Random, count: int, letters: int, alphabet: str = string.ascii_uppercase
) -> list[str]:
    """So many different words of so many letters drawn from an alphabet."""
    return distinct(lambda: "".join(rng.choices(alphabet, k=letters)), count)


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """So many different strings, in the order in which they are drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def insert_all(items: list[T], places: Sequence[int], inserted: Sequence[T]) -> None:
    """Put each of `inserted` at its place among the items as they are now; places rise."""
    # From the last to the first: an insertion moves only what stands behind it.
    for place, item in reversed(list(zip(places, inserted, strict=True))):
        items.insert(place, item)
