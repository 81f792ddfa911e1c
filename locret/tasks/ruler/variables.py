"""RULER's variable tracking (vt): which variables got one value, along a chain of assignments."""

from random import Random

from locret.tasks import wording
from locret.tasks.base import Sample
from locret.tasks.haystack import NOISE
from locret.tasks.ruler.base import RulerTask

CONTEXT = wording.CHAIN_INTRO.format(this="the following") + "\n\n{text}"
QUESTION = f"\nQuestion: {wording.CHAIN_QUESTION}"
ANSWER = f" Answer: {wording.CHAIN_ANSWER}"
MISSPELT = "assgined"  # by the benchmark
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
    names = wording.made_up_words(rng, wording.VARIABLES, letters)
    value = wording.number(rng, 5)
    lines = [" ".join(NOISE)] * noises
    places = sorted(rng.choices(range(noises + 1), k=len(names)))
    wording.insert_all(lines, places, wording.assignments(names, value))
    words = {"value": value, "count": str(len(names)), "assigned": MISSPELT}
    return "\n".join(lines), names, words


def _worked(text: str, names: list[str], words: dict[str, str]) -> str:
    asked = CONTEXT.format(text=text) + QUESTION.format(**words) + ANSWER.format(**words)
    return f"{asked} {' '.join(names)}\n"
