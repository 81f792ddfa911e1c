"""Files of code with questions about them, whose answers are copied from the code.

They are of packages that are installed wherever trainings run, or of a folder; never of Python's
standard library, about which the task `code` asks in evaluations (`locret.tasks.code`). What a
question names is in the context once: a line, a piece of a line, or a function's definition.

    - class_path: datamodules.code.CodeSource
      init_args: {tokens: [512, 4096], size: 10000}
"""

import ast
import contextlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation, SkippedRow, about
from datamodules.sources import MadeSource
from datamodules.texts import count, fit
from locret.tasks.code import LINE_CHARS, Function, default_values, defines, first_line

PACKAGES = ("torch", "transformers", "lightning")
ASKED = 4  # questions about one context
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

_PIECE_CHARS = 8  # of a name that is asked for, at least
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")

QUESTIONS = {
    "after": (
        "Which line of code comes right after the line `{of}`?",
        "In the file {path}, what is the line that follows `{of}`? Reply with this line alone.",
        "What is the next line of code after this one?\n\n{of}",
    ),
    "before": (
        "Which line of code comes right before the line `{of}`?",
        "In {path}, what is the line just above `{of}`? Give this line and nothing else.",
        "Which line stands directly before this one?\n\n{of}",
    ),
    "first": (
        "What is the first line of the body of the function `{function}`?",
        "In the file {path}, which line is the first one inside `{function}`?",
        "Give the line of code that follows the `def` line of `{function}`.",
    ),
    "signature": (
        "Which line defines the function `{function}`?",
        "Give the `def` line of `{function}` in {path}, as it is written there.",
        "What is the signature line of the function `{function}`? Reply with this line alone.",
    ),
    "default": (
        "What is the default value of the parameter `{of}` of the function `{function}`?",
        "In {path}, which value does `{of}` of `{function}` have by default? Reply with the value "
        "alone, as it is in the code.",
        "The function `{function}` has a parameter `{of}`. What is its default?",
    ),
    "assigned": (
        "In the function `{function}`, which line assigns `{of}`?",
        "Give the line of `{function}` in {path} that sets `{of}`.",
        "Where does the function `{function}` assign `{of}`? Reply with the line of code alone.",
    ),
    "contains": (
        "Which line of the code contains `{of}`?",
        "In the file {path}, one line has `{of}` in it. Which one?",
        "Give the whole line in which `{of}` occurs.",
    ),
}
_ANSWERS = ("{}", "`{}`")


@dataclass(frozen=True)
class Code:
    """Code that was parsed: a file, or whole lines of it.

    Attributes:
        tree: its syntax; line numbers are those of `lines`.
        lines: of the text, the first one a line of ours where the text begins within a class.
    """

    path: str
    text: str
    tree: ast.Module
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """What a question is made from.

    Attributes:
        kind: a name in `QUESTIONS`.
        path: of the file.
        function: its name, `Class.__init__` of a class; empty where the question is about lines.
        of: the line, the name, the parameter or the piece that the question names.
        answer: copied from the code, without the spaces around it.
    """

    kind: str
    path: str
    function: str
    of: str
    answer: str

    def is_unique(self, context: str) -> bool:
        """Whether just one answer is right, and asked for by what the context has once."""
        answered = self.kind == "default" or context.count(self.answer) == 1
        if not self.function:
            return answered and context.count(self.of) == 1
        of, _, method = self.function.partition(".")
        times = len(re.findall(rf"\bclass {of}\b", context)) if method else defines(context, of)
        return answered and times == 1

    def told(self, rng: Random) -> tuple[str, str]:
        """The question and the answer, in words that are drawn."""
        words = rng.choice(QUESTIONS[self.kind])
        question = words.format(path=self.path, function=self.function, of=self.of)
        return question, rng.choice(_ANSWERS).format(self.answer)


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
        ValueError: for both packages and path, lengths below 256 or out of order, or size < 1.
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
        loaded: Any = super().load(tokenizer)
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
            if asked := questions(rng, pieces, context):
                return about(context, asked, "code", name)
        raise SkippedRow("no code to ask about", name)

    def _is_usable(self, i: int) -> bool:
        with contextlib.suppress(SkippedRow):
            return bool(self[i])
        return False


def make_context(
    rng: Random, files: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> tuple[str, list[Code]]:
    """Some of the files, (path as it is written, path to read) each, in one text of at most so many
    tokens; and what of them is in it."""
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
    text = _read(place) if tokens > 0 else ""
    if len(text) >= _CHARS:
        text = _whole_lines(rng, text, tokenizer, tokens)
    return parse(path, text) if len(text) >= _CHARS else None


def _read(place: str) -> str:
    """The text of a file, without blank lines around it; empty if it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if Path(place).stat().st_size <= _FILE_BYTES:
            return Path(place).read_text(encoding="utf-8").strip()
    return ""


def _whole_lines(rng: Random, text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """A text of at most so many tokens, or a run of lines between definitions that begins where is
    drawn; empty if none fits."""
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


def find_code(packages: Sequence[str], path: str | None) -> list[tuple[str, str]]:
    """The `.py` files of packages or of a folder: (path as it is written, path to read), sorted by
    what is written, which is the same wherever they are installed.

    Raises:
        ValueError: a package that is not installed, files of the standard library, or no files.
    """
    given = [(root, root.parent) for name in packages for root in _folders(name)]
    given += [] if path is None else [(Path(path), Path(path))]
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


# ---- questions -----------------------------------------------------------------------------------


def parse(path: str, text: str) -> Code | None:
    """A file, or a run of its lines, that begins in a class or outside; None if it is not code."""
    whole = f"if True:\n{text}" if text.startswith(" ") else text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings
            tree = ast.parse(whole)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return Code(path, text, tree, tuple(whole.split("\n")))


def questions(rng: Random, pieces: Sequence[Code], context: str) -> list[tuple[str, str]]:
    """At most `ASKED` questions about a context, with their answers: two of default values, where
    there are any, and others of all kinds in turn.

    Args:
        rng: draws what is asked, and in which words.
        pieces: all the code of the context.
    """
    by_kind: dict[str, list[Asked]] = {kind: [] for kind in QUESTIONS}
    for asked in chain.from_iterable(map(askable, pieces)):
        by_kind[asked.kind].append(asked)
    drawn = {
        kind: (one for one in rng.sample(asked, len(asked)) if one.is_unique(context))
        for kind, asked in by_kind.items()
    }
    defaults = drawn.pop("default")
    turns = [defaults, defaults, *rng.sample([*drawn.values()], len(drawn))]
    found: dict[str, Asked] = {}  # by answer
    for asked in filter(None, chain.from_iterable(zip_longest(*turns))):
        found.setdefault(asked.answer, asked)
        if len(found) == ASKED:
            break
    return [asked.told(rng) for asked in found.values()]


def askable(code: Code) -> Iterator[Asked]:
    """All that can be asked about code, but for what its context has more than once."""
    nodes = [*ast.walk(code.tree)]
    functions = [node for node in nodes if isinstance(node, Function)]
    inside = _inside(code, nodes, functions)
    found = [_of_lines(code, inside), *(_of_function(code, node) for node in functions)]
    found += [_of_class(code, node) for node in nodes if isinstance(node, ast.ClassDef)]
    for asked in chain.from_iterable(found):
        if "`" not in asked.of + asked.answer:
            yield asked


def _of_function(code: Code, node: Function) -> Iterator[Asked]:
    for found in default_values(node, code.lines):
        yield Asked("default", code.path, node.name, found.of, found.answer)
    for found in first_line(node, code.lines):
        yield Asked("first", code.path, node.name, "", found.answer)
    head = code.lines[node.lineno - 1].strip()
    whole = node.body[0].lineno > node.lineno and head.endswith(":")
    if whole and "," in head and _is_line(head):  # of one parameter it may be guessed
        yield Asked("signature", code.path, node.name, "", head)
    for name, line in _assigned(node, code.lines):
        yield Asked("assigned", code.path, node.name, name, line)


def _of_class(code: Code, node: ast.ClassDef) -> Iterator[Asked]:
    """Default values of what makes its objects."""
    functions = (each for each in node.body if isinstance(each, ast.FunctionDef))
    made = [each for each in functions if each.name == "__init__"]
    if len(made) == 1:  # others are overloads
        for found in default_values(made[0], code.lines):
            yield Asked("default", code.path, f"{node.name}.__init__", found.of, found.answer)


def _assigned(node: Function, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and attributes that a function assigns once, in one line; and the line."""
    every = [*ast.walk(node)]
    named = (each for each in every if isinstance(each, ast.Name | ast.Attribute))
    stored = [ast.unparse(each) for each in named if isinstance(each.ctx, ast.Store)]
    known = {each.arg for each in every if isinstance(each, ast.arg)}
    for each in every:
        if isinstance(each, ast.Assign) and each.lineno == each.end_lineno:
            name, line = ast.unparse(each.targets[0]), lines[each.lineno - 1].strip()
            once = stored.count(name) == 1 and name not in known
            if once and line.startswith(f"{name} = ") and _is_line(line):
                yield name, line


def _of_lines(code: Code, inside: Mapping[int, str]) -> Iterator[Asked]:
    """Lines beside each other, and pieces of lines; `inside` has lines by number."""
    for number, line in inside.items():
        for piece in _NAME.findall(line):
            if _PIECE_CHARS <= len(piece) <= len(line) // 2:
                yield Asked("contains", code.path, "", piece, line)
        if number + 1 in inside:
            yield Asked("after", code.path, "", line, inside[number + 1])
            yield Asked("before", code.path, "", inside[number + 1], line)


def _inside(code: Code, nodes: Sequence[ast.AST], functions: Sequence[Function]) -> dict[int, str]:
    """Lines of functions by number, but for comments, long texts, and what is hard to ask about."""
    numbers = {n for node in functions for n in _numbers(node)}
    for node in nodes:
        if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno != node.lineno:
            numbers.difference_update(_numbers(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            numbers.discard(node.lineno)
    stripped = ((n, code.lines[n - 1].strip()) for n in sorted(numbers))
    return {n: line for n, line in stripped if _is_line(line)}


def _numbers(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _is_line(line: str) -> bool:
    """Whether a line is neither short nor long, and no comment."""
    low, high = LINE_CHARS
    return low <= len(line) <= high and "#" not in line
