"""RULER's variable tracking (vt): which variables got one value, along a chain of assignments."""

import string
from random import Random

from locret.tasks.base import Sample
from locret.tasks.ruler.base import RulerTask
from locret.tasks.ruler.haystack import NOISE

CONTEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}"
)
QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
# The misspelling is the benchmark's.
ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assgined the value {value}, they are:"
)
HOPS = 4
EXAMPLE_NOISES = 10
LETTERS, EXAMPLE_LETTERS = 5, 3


class VariableTracking(RulerTask):
    """One chain of four hops among noise, after one worked example with shorter names."""

    name = "ruler_vt"
    max_new_tokens = 30

    def draft(self, rng: Random, index: int, size: int) -> Sample:
        example = _chain(rng, EXAMPLE_NOISES, EXAMPLE_LETTERS)
        text, names, words = _chain(rng, size, LETTERS)
        return Sample(
            id=str(index),
            context=_worked(*example) + CONTEXT.format(text=text),
            question=QUESTION.format(**words),
            answers=tuple(names),
            answer_prefix=ANSWER.format(**words),
        )


def _chain(rng: Random, noises: int, letters: int) -> tuple[str, list[str], dict[str, str]]:
    """The text, the names of the chain, and what question and answer are filled with."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    value = str(rng.randint(10000, 99999))
    sources = [value, *(f"VAR {name}" for name in names)]
    needles = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
    lines = [NOISE] * noises
    places = sorted(rng.choices(range(noises + 1), k=len(needles)))
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        lines.insert(place, needle)
    return "\n".join(lines), list(names), {"value": value, "count": str(len(names))}


def _worked(text: str, names: list[str], words: dict[str, str]) -> str:
    asked = CONTEXT.format(text=text) + QUESTION.format(**words) + ANSWER.format(**words)
    return f"{asked} {' '.join(names)}\n"
