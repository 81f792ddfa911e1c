"""Scores of one answer against its references, each from 0 to 1: every rule by which tasks score.

The normalization, the exact match and the token F1 are SQuAD's (Rajpurkar et al., 2016); ROUGE is
computed by the package `rouge-score` (Google Research) without stemming. The string matches are
RULER's (Hsieh et al., 2024); the rules for options, numbers, statements and code are those of
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


# ---- words in common -----------------------------------------------------------------------------


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of the precision and recall of the words, normalized, repetitions counted."""
    given = normalize(answer).split()

    def f1(reference: str) -> float:
        wanted = normalize(reference).split()
        common = (Counter(given) & Counter(wanted)).total()
        return 2 * common / (len(given) + len(wanted)) if common else 0.0

    return best(f1, references)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer, normalized, is one of the references."""
    return best(lambda wanted: normalize(answer) == normalize(wanted), references)


def best(score: Callable[[str], float], references: Sequence[str]) -> float:
    """The best score over the references; ValueError if there are none, or a text instead of a
    list."""
    _check_references(references)
    return max(float(score(wanted)) for wanted in references)


def _check_references(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError(f"references is {references!r}; expected a list of at least one text")


# ---- ROUGE ---------------------------------------------------------------------------------------


def rouge(answer: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures `rougeL`, `rouge1`, `rouge2`, each the best over the references."""
    _check_references(references)
    found = [_rouge_scorer().score(wanted, answer) for wanted in references]
    return {name: max(scores[name].fmeasure for scores in found) for name in ROUGE}


def check_rouge() -> None:
    """Refuse ROUGE (ValueError) where the package rouge-score is not installed."""
    if importlib.util.find_spec("rouge_score") is None:
        raise ValueError("ROUGE needs the package rouge-score: pip install 'locret[eval]'")


@cache
def _rouge_scorer() -> Any:
    check_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=False)


# ---- strings to be found -------------------------------------------------------------------------


def whole_words_found(answer: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the answer by themselves.

    Case and white space do not matter. A string counts only as a whole word, and a number only as a
    whole number: "123" is found neither in "1234" nor in "5,123" nor in "123.4".
    """
    _check_references(references)
    text = _plain(answer)
    return sum(_holds(text, _plain(wanted)) for wanted in references) / len(references)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _holds(text: str, wanted: str) -> bool:
    first, last = wanted[:1], wanted[-1:]
    before = r"(?<!\w)(?<!\d[.,])" if first.isdigit() else r"(?<!\w)" * first.isalpha()
    after = r"(?!\w)(?![.,]\d)" if last.isdigit() else r"(?!\w)" * last.isalpha()
    return re.search(before + re.escape(wanted) + after, text) is not None


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
    _check_references(references)
    text = answer.lower()
    return [reference.lower() in text for reference in references]


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the answer's first line; case and spaces do not matter."""
    lines = [line for line in answer.splitlines() if len(line) > 1]
    found = _squeezed(lines[0] if lines else answer)
    return best(lambda wanted: _squeezed(wanted) in found, references)


def _squeezed(text: str) -> str:
    return text.lower().replace(" ", "")


def code_match(answer: str, references: Sequence[str]) -> float:
    """1 if the code that an answer gives first is a reference; spaces and quotes around it do not
    matter.

    That is the first line in three backticks, what is in the first two, what is before the only one
    of the answer's first line (the other was given with the answer's first words), or this line.
    """
    return best(lambda wanted: _bare(_first_code(answer)) == _bare(wanted), references)


def _first_code(answer: str) -> str:
    block = re.match(r"\s*```(?:\w*\n)?\s*([^\n]*)", answer)
    if block:
        return block[1].removesuffix("```")
    before, *others = answer.strip().partition("\n")[0].split("`")
    return others[0] if len(others) % 2 == 0 and others else before


def _bare(code: str) -> str:
    return " ".join(code.split()).strip("'\" ")


# ---- L-Eval's answers ----------------------------------------------------------------------------


def options_score(given: str, wanted: str) -> float:
    """1 for the wanted option letters, 0.25 for some of them and none besides, else 0."""
    if not given:
        return 0.0
    letters, right = set(given), set(wanted)
    return 1.0 if letters == right else PARTIAL_OPTIONS if letters < right else 0.0


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


def numbers_equal(given: str, wanted: str) -> float:
    """1 if both are the same number."""
    return float(bool(given and wanted) and float(given) == float(wanted))


def reference_options(reference: str) -> str:
    """`(C) He could not` -> `C`."""
    first = reference.split()[0] if reference.split() else ""
    return re.sub("[^A-D]", "", first)


def truth(text: str) -> str:
    """The first word that says true or false."""
    found = re.search("true|false", text.lower())
    return found[0] if found else ""


def code_found(answer: str, reference: str) -> float:
    """Whether the output stands where an answer says its result: after "the final output", or last.

    As many words as the reference has, and three more, are looked at.
    """
    window = len(reference.split()) + 3
    text = re.sub(
        "will be|of the code|is|would be|the value of|the result of|printed",
        "",
        _plain_code(answer),
    )
    _, said, after = text.rpartition("the final output")
    words = after.split()[:window] if said else text.split()[-window:]
    return contains(" ".join(words), [_plain_code(reference)])


def _plain_code(text: str) -> str:
    """Program output without what people write differently: commas, quotes, `.0`, white space."""
    text = re.sub(r"[,'\\]", "", " ".join(text.split())).replace(".0", "")
    return re.sub(r"(?<=[\[\]]) (?=[\[\]])", "", text)
