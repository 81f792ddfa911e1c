"""Files of code with questions about them, put together on the spot.

They are of packages that are installed wherever trainings run, or of a folder; never of Python's
standard library, about which the task `code` asks in evaluations (`locret.tasks.code`).

    - class_path: datamodules.code.CodeSource
      init_args: {tokens: [512, 4096], size: 10000}
"""

import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerBase

from datamodules.code_questions import Code, parse, questions
from datamodules.conversations import Conversation, SkippedRow, exchange
from datamodules.sources import MadeSource
from datamodules.texts import count, fit
from locret.tasks.code import SourceFile

PACKAGES = ("torch", "transformers", "lightning")
QUESTIONS = 4  # about one context
LEAST = 256  # tokens of a context
PROBES = 8  # contexts that are tried when a source is loaded
_TRIES = 24  # files that are drawn for a context
_ATTEMPTS = 4  # contexts that are made until one has questions
_CHARS = 400  # shorter files and runs of lines define little
_FILE_BYTES = 2**20  # longer ones are no code that people wrote
_TOKEN_CHARS = 5  # code has fewer a token
_MARGIN = 4  # tokens that may be more where files meet

_INSTALLED = {"site-packages", "dist-packages"}  # folders that may be inside the standard library

INTROS = (
    "",
    "Below are files of a code base.\n\n",
    "Here is some code. Read it well.\n\n",
    "The following files are part of a Python project.\n\n",
)
FORMS = (
    "# ==== file: {path} ====\n{text}\n\n",
    "File {path}:\n\n{text}\n\n\n",
    "`{path}`\n\n```python\n{text}\n```\n\n",
    "### {path}\n\n```\n{text}\n```\n\n",
    '<file path="{path}">\n{text}\n</file>\n',
    "--- {path} ---\n{text}\n",
)
_DEFINITION = re.compile(
    r"^(?P<indent>(?: {4})?)(?:@.*\n(?P=indent))*(?:async def|def|class) ", re.MULTILINE
)
"""Where a run of lines may begin and end: before a definition and its decorators."""


class CodeSource(MadeSource):
    """Code with questions.

    A context has whole files, and runs of lines of those that are too long, each under a line with
    its path. Answers are lines of the code and default values of parameters. Files that are not
    code in UTF-8 are passed over when they are drawn.

    Args:
        tokens: of a context, at least 256, or the (least, most) to draw from evenly; a context has
            a few fewer, or many where the files are short.
        size: number of contexts.
        packages: installed ones whose `.py` files are taken; none are imported. `torch`,
            `transformers` and `lightning` if neither these nor `path` are given.
        path: a folder, of which all `.py` files are taken, also those further down.
        seed: another seed, other contexts.

    Raises:
        ValueError: for both packages and path, lengths that are not 256 <= least <= most, or
            size < 1.
    """

    def __init__(
        self,
        tokens: int | tuple[int, int],
        size: int,
        packages: Sequence[str] | None = None,
        path: str | None = None,
        seed: int = 0,
    ) -> None:
        if packages is not None and path is not None:
            raise ValueError(
                f"packages is {[*packages]} and path is {path!r}; expected one of them, so give "
                "another source for the other"
            )
        default = PACKAGES if path is None else ()
        self.packages = list(default if packages is None else packages)
        self.path = path
        super().__init__(tokens, size, seed, LEAST)
        self._files: list[tuple[str, str]] = []

    def __str__(self) -> str:
        return f"CodeSource({self.path or ', '.join(self.packages)}, seed {self.seed})"

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """Find the files, without reading them; see `datamodules.sources.Source.load`.

        Raises:
            ValueError: a package that is not installed, files of the standard library, no files, or
                none about which anything can be asked.
        """
        loaded = super().load(tokenizer)
        assert isinstance(loaded, CodeSource)
        loaded._files = find_code(self.packages, self.path)
        if not any(map(loaded._is_usable, range(min(self.size, PROBES)))):
            raise ValueError(
                f"{self}: {len(loaded._files)} files gave no context with questions in {PROBES} "
                f"tries; expected Python files with functions, of {_CHARS} characters and "
                f"more, and room for them, where tokens is {self.tokens}"
            )
        return loaded

    def make(self, i: int, tokenizer: PreTrainedTokenizerBase) -> Conversation:
        rng, name = Random(f"locret code {self.seed} {i}"), f"code:{self.seed}:{i}"
        tokens = rng.randint(*self.tokens)
        for _ in range(_ATTEMPTS):
            context, pieces = make_context(rng, self._files, tokenizer, tokens)
            if asked := questions(rng, pieces, context, QUESTIONS):
                told = tuple((f"\n\n{question}", answer) for question, answer in asked)
                messages = exchange(context + told[0][0], told[0][1])
                return Conversation(messages, "code", name, context=context, questions=told)
        raise SkippedRow("no code to ask about", name)

    def _is_usable(self, i: int) -> bool:
        try:
            self[i]
        except SkippedRow:
            return False
        return True


def make_context(
    rng: Random, files: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> tuple[str, list[Code]]:
    """Files in one text of at most so many tokens; and what of them is in it.

    Args:
        rng: draws the files, how long they may be, and how their paths are written.
        files: (path as it is written, path to read) of each.
        tokenizer: counts the tokens.
        tokens: of the text, intro and paths included.
    """
    intro, form = rng.choice(INTROS), rng.choice(FORMS)
    largest = tokens // rng.randint(1, min(4, tokens // LEAST))
    texts, pieces = [intro], list[Code]()
    left = tokens - count(intro, tokenizer)
    for path, place in rng.sample(files, min(len(files), _TRIES)):
        around = count(form.format(path=path, text=""), tokenizer) + _MARGIN
        piece = _piece(rng, path, place, tokenizer, min(left, largest) - around)
        if piece is not None:
            pieces.append(piece)
            texts.append(form.format(path=path, text=piece.text))
            left -= count(texts[-1], tokenizer) + _MARGIN
        if left < tokens // 8:
            break
    return "".join(texts).rstrip(), pieces


def _piece(
    rng: Random, path: str, place: str, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> Code | None:
    """A file, or a run of its lines; None if it is too short, or not code."""
    text = read(place) if tokens > 0 else ""
    if len(text) >= _CHARS:
        text = whole_lines(rng, text, tokenizer, tokens)
    return parse(SourceFile(path, text)) if len(text) >= _CHARS else None


def read(place: str) -> str:
    """The text of a file, without blank lines around it; empty if it cannot be read."""
    try:
        if Path(place).stat().st_size > _FILE_BYTES:
            return ""
        return Path(place).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def whole_lines(rng: Random, text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """A text of at most so many tokens, or a run of lines between definitions; empty if none fits.

    Where a run begins is drawn.
    """
    most = tokens * _TOKEN_CHARS
    if len(text) <= most and count(text, tokenizer) <= tokens:
        return text
    places = [match.start() for match in _DEFINITION.finditer(text)]
    if not places:
        return ""
    start = rng.choice(places)
    kept, _ = fit(text[start : start + most], tokens, tokenizer)
    ends = [end for end in (*places, len(text)) if start < end <= start + len(kept)]
    return text[start : ends[-1]].rstrip() if ends else ""


# ---- where files are -----------------------------------------------------------------------------


def find_code(packages: Sequence[str], path: str | None) -> list[tuple[str, str]]:
    """The `.py` files of packages or of a folder: (path as it is written, path to read), sorted by
    what is written, which is the same wherever they are installed.

    Raises:
        ValueError: a package that is not installed, files of the standard library, or no files.
    """
    given = [(root, root.parent) for name in packages for root in _folders(name)]
    if path is not None:
        given.append((Path(path), Path(path)))
    found = {
        file.relative_to(above).as_posix(): str(file)
        for root, above in given
        for file in root.rglob("*.py")
        if file.is_file()
    }
    if not found:
        raise ValueError(
            f"{path or ', '.join(packages) or 'no package'} has no .py files (working directory "
            f"{Path.cwd()}); expected a folder or packages of Python code"
        )
    _refuse_standard(found.values())
    return sorted(found.items())


def _folders(package: str) -> Iterator[Path]:
    """Where a package is. The spec of a name with dots would import what is above it."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"packages names {package!r}, which is not an installed package; expected such as "
            f"{', '.join(PACKAGES)}, or give the folder as path"
        )
    yield from map(Path, spec.submodule_search_locations)


def _refuse_standard(places: Iterable[str]) -> None:
    library = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
    for place in places:
        real = os.path.realpath(place)
        inside = real.removeprefix(library).split(os.sep)[0]
        if real.startswith(library) and inside not in _INSTALLED:
            raise ValueError(
                f"{place} is of Python's standard library, about which the task `code` asks in "
                "evaluations; expected other code, so name a package or a folder without it"
            )
