"""RULER's scores of an answer's text, and ROUGE-L without a package, 0 to 1. Pure functions."""

import re
from collections.abc import Sequence


def without_controls(text: str) -> str:
    """RULER's post-processing: control characters become line breaks, ends are stripped."""
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the answer, whatever the case (RULER)."""
    return sum(_found(answer, references)) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if any reference stands in the answer, whatever the case (RULER's qa tasks)."""
    return float(any(_found(answer, references)))


def _found(answer: str, references: Sequence[str]) -> list[bool]:
    text = answer.lower()
    return [reference.lower() in text for reference in references]


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, the best over the references.

    Words are runs of letters a-z and digits, in lower case, not stemmed (as rouge-score's).
    """
    given = _words(answer)
    return max(_subsequence_f1(given, _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _subsequence_f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    shared = _common_subsequence(given, wanted)
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for j, other in enumerate(right, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
