"""One meaning a word (docs/design.md): names of the library do without words that had two."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "locret"
BANNED = {"coded", "held", "marks", "settle", "settled", "slack", "rolling", "parts"}
FORMATS = {"loglikelihood_rolling"}
"""Names that others chose."""


def names(path):
    """Every name that a file defines: classes, functions, arguments, variables, attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield getattr(node, "id", None) or node.attr, node.lineno


def words(name):
    return re.findall(r"[a-z]+", re.sub(r"([A-Z])", r"_\1", name).lower())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_names_have_one_meaning(path):
    found = [(n, line) for n, line in names(path) if n not in FORMATS and BANNED & set(words(n))]
    assert found == []
