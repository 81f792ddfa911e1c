"""RULER (Hsieh et al., arXiv 2404.06654): its 13 tasks, made without a network.

Wording, task settings, steps of length and scores are the benchmark's. The running text is a file
of the user's or the language reference of CPython instead of essays from the web; the words are
those of the package wonderwords, as in RULER.
"""

import math
import string
import uuid
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from locret.tasks import wording
from locret.tasks.base import Sample, read_contexts
from locret.tasks.haystack import (
    NOISE,
    essay_files,
    essay_words,
    read_words,
    sentences_of,
    word_files,
)
from locret.tasks.metrics import exact_match, string_match_part, token_f1
from locret.tasks.ruler_base import RulerTask

# ---- needles: special magic numbers or UUIDs of keys, hidden in a haystack -----------------------

Kind = Literal["numbers", "words", "uuids"]

NEEDLES_CONTEXT = wording.NEEDLE_INTRO + "\n{text}"
NEEDLES_QUESTION = f"\n{wording.NEEDLE_QUESTION}"
NEEDLES_ANSWER = f" {wording.NEEDLE_ANSWER}"

DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent: where needles may stand in prose


@dataclass(frozen=True)
class Needles:
    """How many needles of which kind lie in which haystack (RULER, table of task settings)."""

    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


class NeedleTask(RulerTask):
    """Name the values of the keys asked for."""

    max_new_tokens = 128
    needles: ClassVar[Needles]

    def files(self) -> list[Path]:
        essay = essay_files(self.settings) if self.needles.haystack == "essay" else []
        return [*essay, *self._word_files()]

    def _word_files(self) -> list[Path]:
        if "words" not in (self.needles.key, self.needles.value):
            return []
        return [word_files(self.settings)[kind] for kind in ("adjective", "noun")]

    def prepare(self) -> None:
        self.least = self.needles.keys * self.needles.values
        self._lists = [read_words(path) for path in self._word_files()]
        self._essay = essay_words(self.settings) if self.needles.haystack == "essay" else []

    def draft(self, rng: Random, index: int, size: int) -> Sample:
        given = self.needles
        keys = [self._draw(rng, given.key) for _ in range(given.keys)]
        values = [[self._draw(rng, given.value) for _ in range(given.values)] for _ in keys]
        needles = [
            self._needle(key, value)
            for key, those in zip(keys, values, strict=True)
            for value in those
        ]
        rng.shuffle(needles)
        text = self._prose(rng, size, needles) if self._essay else self._lines(rng, size, needles)
        asked = rng.sample(range(given.keys), given.queries)
        single = given.queries * given.values == 1
        words = wording.needle_words(given.value, [keys[i] for i in asked], single)
        return Sample(
            id=str(index),
            context=NEEDLES_CONTEXT.format(text=text, it="it", **words),
            question=NEEDLES_QUESTION.format(**words),
            answers=tuple(value for i in asked for value in values[i]),
            answer_prefix=NEEDLES_ANSWER.format(**words),
        )

    def _needle(self, key: str, value: str) -> str:
        return wording.NEEDLE.format(kind=self.needles.value, key=key, value=value)

    def _draw(self, rng: Random, kind: Kind) -> str:
        if kind == "numbers":
            return wording.number(rng, 7)
        if kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        adjectives, nouns = self._lists
        return wording.key(rng, adjectives, nouns)

    def _prose(self, rng: Random, size: int, needles: list[str]) -> str:
        sentences = sentences_of(self._essay, size)
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        # A place is a share of the text with the needles behind it.
        for depth, needle in reversed(list(zip(depths, needles, strict=True))):
            sentences.insert(len(sentences) * depth // 100, needle)
        return " ".join(sentences)

    def _lines(self, rng: Random, size: int, needles: list[str]) -> str:
        given = self.needles
        lines = [
            " ".join(NOISE)
            if given.haystack == "noise"
            else self._needle(self._draw(rng, given.key), self._draw(rng, given.value))
            for _ in range(size)
        ]
        places = sorted(rng.sample(range(size), len(needles)))
        wording.insert_all(lines, places, needles[::-1])  # the last needle stands first
        return "\n".join(lines)


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}


# ---- vt: which variables got one value, along a chain of assignments -----------------------------

CHAIN_CONTEXT = wording.CHAIN_INTRO.format(this="the following") + "\n\n{text}"
CHAIN_QUESTION = f"\nQuestion: {wording.CHAIN_QUESTION}"
CHAIN_ANSWER = f" Answer: {wording.CHAIN_ANSWER}"
MISSPELT = "assgined"  # by the benchmark
EXAMPLE_NOISES = 10
LETTERS, EXAMPLE_LETTERS = 5, 3


class VariableTracking(RulerTask):
    """One chain of four hops among noise, after one worked example with shorter names."""

    name = "ruler_vt"
    max_new_tokens = 30

    def draft(self, rng: Random, index: int, size: int) -> Sample:
        text, names, words = _chain(rng, EXAMPLE_NOISES, EXAMPLE_LETTERS)
        worked = (CHAIN_CONTEXT + CHAIN_QUESTION + CHAIN_ANSWER).format(text=text, **words)
        worked += f" {' '.join(names)}\n"
        text, names, words = _chain(rng, size, LETTERS)
        return Sample(
            id=str(index),
            context=worked + CHAIN_CONTEXT.format(text=text),
            question=CHAIN_QUESTION.format(**words),
            answers=tuple(names),
            answer_prefix=CHAIN_ANSWER.format(**words),
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


# ---- cwe and fwe: the most common words of a list, of a text in made-up words --------------------

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
MADE_UP_LETTERS = 6
ASKED = 3  # made-up words
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
        count = max(self.length // 50 - 1, ASKED)
        vocabulary = [
            NOISE_WORD,
            *wording.made_up_words(rng, count, MADE_UP_LETTERS, string.ascii_lowercase),
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


# ---- qa: SQuAD and HotpotQA among other documents ------------------------------------------------

REQUEST = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\n"
)
DOCUMENTS_CONTEXT = REQUEST + "The following are given documents.\n\n{documents}"
DOCUMENTS_QUESTION = "\n\n" + REQUEST + "Question: {question}"
DOCUMENTS_ANSWER = " Answer:"


class DocumentTask(RulerTask):
    """A question, the documents that answer it, and others of the same file, in seeded order.

    Which questions come first is seeded too: neighbours in the file ask about the same text.
    RULER's own score forgives any words around the answer; F1 and exact match, SQuAD's, do not.
    """

    metrics = ("string_match", "f1", "exact_match")
    max_new_tokens = 32
    match = staticmethod(string_match_part)
    data: ClassVar[str]
    file: ClassVar[str]

    def files(self) -> list[Path]:
        return [self.settings.file(self.data, self.file)]

    def prepare(self) -> None:
        self._questions = [
            (asked["question"].strip(), tuple(dict.fromkeys(asked["answers"])), documents)
            for documents, row in (
                (self.documents_of(row["context"]), row) for row in read_contexts(self.files()[0])
            )
            for asked in row["qa"]
        ]
        Random(f"{self.name} {self.settings.seed}").shuffle(self._questions)
        self._documents = sorted({text for _, _, own in self._questions for text in own})
        self.most = len(self._documents)

    def documents_of(self, context: str) -> list[str]:
        """The documents that a row's context holds."""
        return [context.strip()]

    def available(self) -> int | None:
        return len(self._questions)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return super().score(sample, answer) | {
            "f1": token_f1(answer, sample.answers),
            "exact_match": exact_match(answer, sample.answers),
        }

    def draft(self, rng: Random, index: int, size: int) -> Sample:
        question, answers, own = self._questions[index]
        others = rng.sample(self._documents, min(size + len(own), len(self._documents)))
        chosen = own + [text for text in others if text not in own][: max(size - len(own), 0)]
        rng.shuffle(chosen)
        numbered = [f"Document {i}:\n{text}" for i, text in enumerate(chosen, start=1)]
        return Sample(
            id=str(index),
            context=DOCUMENTS_CONTEXT.format(documents="\n\n".join(numbered)),
            question=DOCUMENTS_QUESTION.format(question=question),
            answers=answers,
            answer_prefix=DOCUMENTS_ANSWER,
        )


class Squad(DocumentTask):
    name = "ruler_qa_1"
    data, file = "squad", "squad_dev_short.jsonl.gz"


class HotpotQA(DocumentTask):
    name = "ruler_qa_2"
    data, file = "hotpotqa", "hotpotqa_dev.jsonl.gz"

    def documents_of(self, context: str) -> list[str]:
        """Paragraphs, each under its title, with a blank line between them."""
        return [text.strip() for text in context.split("\n\n") if text.strip()]


RULER_TASKS: tuple[type[RulerTask], ...] = (
    *(
        type(name, (NeedleTask,), {"name": f"ruler_{name}", "needles": needles})
        for name, needles in NEEDLES.items()
    ),
    VariableTracking,
    CommonWords,
    FrequentWords,
    Squad,
    HotpotQA,
)
