"""Questions about code, with answers that are copied from it.

What a question names is in the context once: a line, a piece of a line, or a function's definition.
"""

import ast
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from random import Random

from locret.tasks.code import (
    LINE_CHARS,
    Function,
    SourceFile,
    default_values,
    defines,
    first_line,
)

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
_OF_FUNCTIONS = {"first", "signature", "default", "assigned"}
_ANSWERS = ("{}", "`{}`")


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
        if self.kind in _OF_FUNCTIONS and _times(context, self.function) != 1:
            return False
        once = [] if self.kind == "default" else [self.answer]
        if self.kind in ("after", "before", "contains"):
            once.append(self.of)
        return all(context.count(each) == 1 for each in once)


def _times(context: str, function: str) -> int:
    """How often a function is defined, or the class whose method it is."""
    of, _, method = function.partition(".")
    return len(re.findall(rf"\bclass {of}\b", context)) if method else defines(context, of)


@dataclass(frozen=True)
class Code:
    """Code that was parsed.

    Attributes:
        path: of its file.
        text: the file's, or whole lines of it.
        tree: its syntax; line numbers are those of `lines`.
        lines: of the text, the first one a line of ours where the text begins within a class.
    """

    path: str
    text: str
    tree: ast.Module
    lines: tuple[str, ...]


def parse(file: SourceFile) -> Code | None:
    """A file, or a run of its lines, that begins in a class or outside; None if it is not code."""
    text = f"if True:\n{file.text}" if file.text.startswith(" ") else file.text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return Code(file.path, file.text, tree, tuple(text.split("\n")))


def questions(
    rng: Random, pieces: Sequence[Code], context: str, most: int
) -> list[tuple[str, str]]:
    """At most so many questions about a context, with their answers: two of default
    values, where there are any, and others of all kinds in turn.

    Args:
        rng: draws what is asked, and in which words.
        pieces: all the code of the context.
        context: the whole of it, with all that is around the pieces.
        most: how many questions.
    """
    by_kind: dict[str, list[Asked]] = {kind: [] for kind in QUESTIONS}
    for asked in chain.from_iterable(map(askable, pieces)):
        by_kind[asked.kind].append(asked)
    drawn = {kind: _unique(rng, asked, context) for kind, asked in by_kind.items()}
    defaults = drawn.pop("default")
    turns = [defaults, defaults, *rng.sample([*drawn.values()], len(drawn))]
    found: dict[str, Asked] = {}  # by answer
    for asked in filter(None, chain.from_iterable(zip_longest(*turns))):
        found.setdefault(asked.answer, asked)
        if len(found) == most:
            break
    return [_told(rng, asked) for asked in found.values()]


def _unique(rng: Random, found: Sequence[Asked], context: str) -> Iterator[Asked]:
    """Those with one right answer, in an order that is drawn."""
    return (asked for asked in rng.sample(found, len(found)) if asked.is_unique(context))


def _told(rng: Random, asked: Asked) -> tuple[str, str]:
    words = rng.choice(QUESTIONS[asked.kind])
    question = words.format(path=asked.path, function=asked.function, of=asked.of)
    return question, rng.choice(_ANSWERS).format(asked.answer)


# ---- what can be asked ---------------------------------------------------------------------------


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
    functions = [each for each in node.body if isinstance(each, ast.FunctionDef)]
    made = [each for each in functions if each.name == "__init__"]
    if len(made) == 1:  # others are overloads
        for found in default_values(made[0], code.lines):
            name = f"{node.name}.__init__"
            yield Asked("default", code.path, name, found.of, found.answer)


def _assigned(node: Function, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and attributes that a function assigns once, in one line; and the line."""
    every = [*ast.walk(node)]
    stored = [ast.unparse(each) for each in every if _is_stored(each)]
    known = {each.arg for each in every if isinstance(each, ast.arg)}
    for each in every:
        if isinstance(each, ast.Assign) and each.lineno == each.end_lineno:
            name, line = ast.unparse(each.targets[0]), lines[each.lineno - 1].strip()
            once = stored.count(name) == 1 and name not in known
            if once and line.startswith(f"{name} = ") and _is_line(line):
                yield name, line


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store)


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
