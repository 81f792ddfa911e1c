"""A definition asked for among many files of code, made to a length.

A context is a seeded choice of whole files of CPython's standard library, each under a line with
its path. Every other question asks for a parameter's default value, the rest for the first line of
a function. Only one function of the context has that name, and the answer is copied from the code.
The files differ between Python versions; `library_origin` says which these are.

Models of code have read these files in their training: what is found by a policy that keeps next to
nothing of the context, such as streaming_llm, is known by heart.
"""

import ast
import hashlib
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from random import Random
from typing import Literal

from locret.tasks.base import MadeTask, Prompts, Sample
from locret.tasks.metrics import code_match

PACKAGES = (
    *("asyncio", "collections", "concurrent", "curses", "dbm", "email", "html", "http"),
    *("importlib", "json", "logging", "multiprocessing", "re", "sqlite3", "tkinter", "tomllib"),
    *("unittest", "urllib", "venv", "wsgiref", "xml", "xmlrpc", "zoneinfo"),
)
OF_THE_MACHINE = ("_sysconfigdata", "sitecustomize")
FILE_CHARS = (800, 20_000)  # shorter files define little, longer ones leave no room for others
ANSWER_CHARS = (2, 60)
LINE_CHARS = (12, 90)  # a shorter line is no news, a longer one is hard to copy

Kind = Literal["default", "line"]


@dataclass(frozen=True)
class SourceFile:
    """A file: its path in the library, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Definition:
    """What a function defines.

    Attributes:
        kind: the default value of a parameter, or the line after that of the `def`.
        function: its name; the file defines it once.
        of: the parameter, or the line of the `def`.
        answer: the value or the line, as it is in the file.
    """

    kind: Kind
    function: str
    of: str
    answer: str


INTRO = "Below are files of a code base. A question about them will follow.\n"
FILE = "\n# ==== file: {path} ====\n{text}\n"
QUESTIONS: dict[Kind, str] = {
    "default": "\nIn the file {path}, what is the default value of the parameter `{of}` of the "
    "function `{function}`? Reply with the value alone, as it is in the code.",
    "line": "\nIn the file {path}, which line of code comes right after the line `{of}`? Reply "
    "with this line alone.",
}
ANSWERS: dict[Kind, str] = {
    "default": " The default value is `",
    "line": " The line after it is `",
}
KINDS: tuple[Kind, ...] = tuple(QUESTIONS)
Tokens = Callable[[SourceFile], int]
LARGEST = 3  # no file takes more than a third of the length


class CodeTask(MadeTask):
    """Name a default value or a line of code. `exact_match`: the answer gives just this."""

    name = "code"
    metrics = ("exact_match",)
    max_new_tokens = 64

    def origins(self) -> dict[str, str]:
        return library_origin()

    def made(self, count: int, prompts: Prompts) -> list[Sample]:
        @cache
        def tokens(file: SourceFile) -> int:
            text = FILE.format(path=file.path, text=file.text)
            ids = prompts.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return len(ids)

        return [self._sample(number, prompts, tokens) for number in range(count)]

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return {"exact_match": code_match(answer, sample.answers)}

    def _sample(self, number: int, prompts: Prompts, tokens: Tokens) -> Sample:
        """Sample number `number`: it depends on no other one."""
        rng = Random(f"code {self.settings.seed} {number}")
        files = rng.sample(library_files(), len(library_files()))
        kind = KINDS[number % len(KINDS)]
        for file in files:
            asked = [found for found in definitions(file) if found.kind == kind]
            if asked and tokens(file) <= self.length // LARGEST:
                definition = rng.choice(asked)
                chosen = self._fitting(file, definition, files, prompts, tokens)
                rng.shuffle(chosen)
                return _asked(str(number), chosen, file, definition)
        raise self.does_not_fit()

    def _fitting(
        self,
        file: SourceFile,
        definition: Definition,
        files: Sequence[SourceFile],
        prompts: Prompts,
        tokens: Tokens,
    ) -> list[SourceFile]:
        """The file and as many others as fit beside it."""

        def room(chosen: list[SourceFile]) -> int:
            used = prompts.measure(_asked("", chosen, file, definition))
            return self.length - self.max_new_tokens - used

        chosen, left = [file], room([file])
        for other in files:
            size = tokens(other)
            fits = size <= min(left, self.length // LARGEST)
            if other is not file and fits and not defines(other.text, definition.function):
                chosen.append(other)
                left -= size
        while len(chosen) > 1 and room(chosen) < 0:  # tokens that reach over the end of a file
            chosen.pop()
        return chosen


def _asked(
    name: str, chosen: Sequence[SourceFile], file: SourceFile, definition: Definition
) -> Sample:
    """The question about a file among those chosen."""
    texts = (FILE.format(path=each.path, text=each.text) for each in chosen)
    return Sample(
        id=name,
        context=INTRO + "".join(texts),
        question=QUESTIONS[definition.kind].format(
            path=file.path, of=definition.of, function=definition.function
        ),
        answers=(definition.answer,),
        answer_prefix=ANSWERS[definition.kind],
    )


# ---- files and what functions define -------------------------------------------------------------


@lru_cache(maxsize=1)
def library_files() -> tuple[SourceFile, ...]:
    """The modules of the standard library and of its packages, sorted by path, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        *root.glob("*.py"),
        *(path for name in PACKAGES for path in (root / name).rglob("*.py")),
    ]
    read = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for path in found
        if not path.name.startswith(OF_THE_MACHINE)
    }
    low, high = FILE_CHARS
    return tuple(
        SourceFile(path, text.strip())
        for path, text in sorted(read.items())
        if low <= len(text) <= high and "/test" not in path
    )


def library_origin() -> dict[str, str]:
    """The Python whose library it is, with the hash of the files."""
    rows = "\n".join(f"{file.path}\n{file.text}" for file in library_files())
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return {version: hashlib.sha256(rows.encode()).hexdigest()[:16]}


def defines(text: str, function: str) -> int:
    """How many times a function of this name is defined."""
    return len(re.findall(rf"\bdef {function}\b", text))


@lru_cache(maxsize=512)
def definitions(file: SourceFile) -> tuple[Definition, ...]:
    """What can be asked about the functions of a file, those in classes included."""
    functions = [
        node
        for node in ast.walk(ast.parse(file.text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("__")
        and defines(file.text, node.name) == 1
    ]
    lines = file.text.splitlines()
    return tuple(
        found
        for node in functions
        for found in (*default_values(node, lines), *first_line(node, lines))
        if "`" not in found.of + found.answer
    )


Function = ast.FunctionDef | ast.AsyncFunctionDef


def default_values(node: Function, lines: Sequence[str]) -> Iterator[Definition]:
    """Default values that cannot be guessed: not None, True, False, a digit or the parameter."""
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    first = len(positional) - len(args.defaults)
    pairs = [*zip(positional[first:], args.defaults, strict=True)]
    pairs += [
        (arg, value) for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True) if value
    ]
    low, high = ANSWER_CHARS
    for arg, value in pairs:
        answer = _written(value, lines)
        if low <= len(answer) <= high and answer != arg.arg and _tells_something(value):
            yield Definition("default", node.name, arg.arg, answer)


def _written(value: ast.expr, lines: Sequence[str]) -> str:
    """How a value is written; nothing where it has several lines."""
    if value.lineno != value.end_lineno:
        return ""
    return lines[value.lineno - 1].encode()[value.col_offset : value.end_col_offset].decode()


def _tells_something(value: ast.expr) -> bool:
    if isinstance(value, ast.Constant):
        return value.value not in (None, True, False, "", b"", ...)
    return isinstance(value, ast.Name | ast.Attribute)


def first_line(node: Function, lines: Sequence[str]) -> Iterator[Definition]:
    """The statement after the line of the `def`, where both are one line and no text or comment."""
    statement = node.body[0]
    told = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    if told or not node.lineno + 1 == statement.lineno == statement.end_lineno:
        return
    head, line = (lines[number - 1].strip() for number in (node.lineno, statement.lineno))
    low, high = LINE_CHARS
    if low <= len(line) <= high and len(head) <= high and "#" not in head + line:
        yield Definition("line", node.name, head, line)
