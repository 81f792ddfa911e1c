"""Scores of one answer against its references, each from 0 to 1; of several references the best.

The normalization and the token F1 are SQuAD's (Rajpurkar et al., 2016); ROUGE is computed by the
package `rouge-score` (Google Research) without stemming. The option and number rules are those of
L-Eval's scorer (An et al., 2023).
"""

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

ROUGE = ("rougeL", "rouge1", "rouge2")
PARTIAL_OPTIONS = 0.25  # some but not all of the right options, and no wrong one


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the prediction's first line; case and spaces do not matter."""
    lines = [line for line in prediction.splitlines() if len(line) > 1]
    found = _squeezed(lines[0] if lines else prediction)
    return _best(lambda wanted: _squeezed(wanted) in found, references)


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of the precision and recall of the words, normalized, repetitions counted."""
    return _best(lambda wanted: _f1(normalize(prediction), normalize(wanted)), references)


def rouge(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures `rougeL`, `rouge1`, `rouge2`, each the best over the references.

    Raises:
        ValueError: the package rouge-score is not installed.
    """
    _check_references(references)
    found = [_rouge_scorer().score(wanted, prediction) for wanted in references]
    return {name: max(scores[name].fmeasure for scores in found) for name in ROUGE}


def options_score(prediction: str, reference: str) -> float:
    """1 for the reference's option letters, 0.25 for some of them and none besides, else 0."""
    given, wanted = set(prediction), set(reference)
    if not given:
        return 0.0
    return 1.0 if given == wanted else PARTIAL_OPTIONS if given < wanted else 0.0


def option_letter(answer: str) -> str:
    """The first of the letters A to D in an answer, "" if there is none.

    Capital letters within words count, as in L-Eval's scorer: a model is asked for the letter only.
    """
    return next((char for char in answer if char in "ABCD"), "")


def option_letters(answer: str) -> str:
    """All options that an answer names, sorted: letters A to D it starts with (`ABD`).

    With fewer than two of those, also each one before a space, a full stop or a bracket, up to the
    word Question.
    """
    run = re.match(r"[ABCD]*", answer)
    letters = run[0] if run else ""
    if len(letters) < 2:
        rest = answer[len(letters) :].partition("Question")[0]
        letters += "".join(re.findall(r"[A-D](?=[\s.)])", rest))
    return "".join(sorted(set(letters)))


def final_number(answer: str) -> str:
    """The whole part of the number an answer comes to, as digits; "" if it has none.

    That is the word after "The answer is", else the last word with a digit of the first paragraph.
    """
    said = re.search(r"The answer is (\S+)", answer)
    words = [said[1]] if said else answer.split("\n\n")[0].split(" ")
    number = next((word for word in reversed(words) if re.search(r"\d", word)), "")
    return re.sub(r"\D", "", number.partition(".")[0])


def numbers_equal(prediction: str, reference: str) -> float:
    """1 if both are the same number."""
    return float(bool(prediction and reference) and float(prediction) == float(reference))


def _best(score: Callable[[str], float], references: Sequence[str]) -> float:
    _check_references(references)
    return max(float(score(wanted)) for wanted in references)


def _check_references(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError(f"references is {references!r}; expected a list of at least one text")


def _squeezed(text: str) -> str:
    return text.lower().replace(" ", "")


def _f1(prediction: str, reference: str) -> float:
    given, wanted = prediction.split(), reference.split()
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def check_rouge() -> None:
    """Refuse ROUGE where it cannot be computed.

    Raises:
        ValueError: the package rouge-score is not installed.
    """
    if importlib.util.find_spec("rouge_score") is None:
        raise ValueError("ROUGE needs the package rouge-score: pip install 'locret[eval]'")


@cache
def _rouge_scorer() -> Any:
    check_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=False)
