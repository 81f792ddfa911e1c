"""RULER's counting tasks: the most common words of a list (cwe), of a coded text (fwe)."""

import math
import string
from pathlib import Path
from random import Random

from locret.tasks import wording
from locret.tasks.base import Sample
from locret.tasks.haystack import read_words, word_files
from locret.tasks.ruler.base import RulerTask

COMMON_CONTEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{words}"
)
COMMON_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
COMMON_ANSWER = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10  # words that are asked for
SHORT = 4096  # shorter lists repeat their words less

FREQUENT_CONTEXT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {words}"
)
FREQUENT_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
FREQUENT_ANSWER = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
NOISE_WORD = "..."  # the most frequent one, to be ignored
CODED_LETTERS = 6
ASKED = 3  # coded words
ALPHA = 2.0
ZETA_OF_ALPHA = math.pi**2 / 6


class CommonWords(RulerTask):
    """Ten words stand more often in the list than the others; one worked example comes first."""

    name = "ruler_cwe"
    max_new_tokens = 120
    least = COMMON

    def files(self) -> list[Path]:
        return list(dict.fromkeys(word_files(self.settings).values()))

    def prepare(self) -> None:
        self._words = sorted({word for path in self.files() for word in read_words(path)})
        self.most = len(self._words)

    def draft(self, rng: Random, index: int, size: int) -> Sample:
        assert self.length is not None
        short = self.length < SHORT
        shown, of_it = self._listed(rng, 20 if short else 40, *((3, 1) if short else (10, 3)))
        asked, answers = self._listed(rng, size, *((6, 1) if short else (30, 3)))
        worked = f"{COMMON_CONTEXT.format(words=shown)}{COMMON_QUESTION}{COMMON_ANSWER}"
        return Sample(
            id=str(index),
            context=f"{worked}{_numbered(of_it)}\n{COMMON_CONTEXT.format(words=asked)}",
            question=COMMON_QUESTION,
            answers=tuple(answers),
            answer_prefix=COMMON_ANSWER,
        )

    def _listed(self, rng: Random, size: int, common: int, others: int) -> tuple[str, list[str]]:
        """A list of `size` different words and its common ones; how often each kind stands."""
        drawn = rng.sample(self._words, size)
        words = drawn[:COMMON] * common + drawn[COMMON:] * others
        rng.shuffle(words)
        return _numbered(words), drawn[:COMMON]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


class FrequentWords(RulerTask):
    """Made-up words whose frequencies fall as Zipf's law says."""

    name = "ruler_fwe"
    max_new_tokens = 50

    def draft(self, rng: Random, index: int, size: int) -> Sample:
        assert self.length is not None
        coded = max(self.length // 50 - 1, ASKED)
        vocabulary = [
            NOISE_WORD,
            *wording.made_up_words(rng, coded, CODED_LETTERS, string.ascii_lowercase),
        ]
        words = [
            word
            for rank, word in enumerate(vocabulary, start=1)
            for _ in range(int(size * rank**-ALPHA / ZETA_OF_ALPHA))
        ]
        rng.shuffle(words)
        return Sample(
            id=str(index),
            context=FREQUENT_CONTEXT.format(words=" ".join(words)),
            question=FREQUENT_QUESTION,
            answers=tuple(vocabulary[1 : 1 + ASKED]),
            answer_prefix=FREQUENT_ANSWER,
        )
