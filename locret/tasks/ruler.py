"""RULER (Hsieh et al., arXiv 2404.06654): its 13 tasks, made without a network.

Wording, task settings, steps of length and scores are the benchmark's. The running text is a file
of the user's or the language reference of CPython instead of essays from the web; the words are
those of the package wonderwords, as in RULER.

A task drafts a sample around so many units of haystack (words, sentences, documents). How many fit
is found on the first sample; a sample that turns out too long gets fewer. Sample number i depends
on the seed and i alone, so the first samples are the same however many are asked for.
"""

import math
import string
import uuid
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from locret.tasks import haystack
from locret.tasks.base import MadeTask, Prompts, Sample, read_contexts
from locret.tasks.metrics import (
    exact_match,
    string_match_all,
    string_match_part,
    token_f1,
    without_controls,
)

# ---- a haystack cut to a length ------------------------------------------------------------------

SHRINK = 0.01  # of the haystack, where a sample is longer than the first one


class RulerTask(MadeTask):
    """A task made of so many units of haystack, `least` to `most` of them; None = as many as
    fit."""

    group = "ruler"
    metrics: ClassVar[tuple[str, ...]] = ("string_match",)
    match: ClassVar[Callable[..., float]] = staticmethod(string_match_all)
    least: int = 1
    most: int | None = None

    def prepare(self) -> None:
        """Read the data files."""

    @abstractmethod
    def draft(self, rng: Random, index: int, size: int) -> Sample:
        """Sample number `index` with `size` units of haystack."""

    def available(self) -> int | None:
        """How many samples there can be; None = any number."""
        return None

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return {"string_match": type(self).match(without_controls(answer), sample.answers)}

    def made(self, count: int, prompts: Prompts) -> list[Sample]:
        self.prepare()
        size, available = self._size(prompts), self.available()
        indices = range(count if available is None else available)
        made = (self._longest(index, size, prompts) for index in indices)
        found = list(islice((sample for sample in made if sample is not None), count))
        if not found:
            raise self.does_not_fit()
        return found

    def _size(self, prompts: Prompts) -> int:
        """The most units of haystack that fit the first sample; `least` if none do."""
        fits, beyond = self.least, self.least + 1
        while self.most is None or beyond <= self.most:
            if self._fitting(0, beyond, prompts) is None:
                break
            fits, beyond = beyond, 2 * beyond
        beyond = beyond if self.most is None else min(beyond, self.most + 1)
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if self._fitting(0, middle, prompts) is None:
                beyond = middle
            else:
                fits = middle
        return fits

    def _longest(self, index: int, size: int, prompts: Prompts) -> Sample | None:
        """The sample with as much haystack as fits; None if it does not fit at all."""
        step = max(1, int(size * SHRINK))
        sizes = (max(fewer, self.least) for fewer in range(size, self.least - step, -step))
        drafts = (self._fitting(index, fewer, prompts) for fewer in sizes)
        return next((sample for sample in drafts if sample is not None), None)

    def _fitting(self, index: int, size: int, prompts: Prompts) -> Sample | None:
        """The sample, if it fits."""
        rng = Random(f"ruler {self.name} {self.settings.seed} {index}")
        sample = self.draft(rng, index, size)
        return sample if prompts.measure(sample) + self.max_new_tokens <= self.length else None


# ---- needles: special magic numbers or UUIDs of keys, hidden in a haystack -----------------------

Kind = Literal["numbers", "words", "uuids"]

NEEDLES_CONTEXT = haystack.NEEDLE_INTRO + "\n{text}"
NEEDLES_QUESTION = f"\n{haystack.NEEDLE_QUESTION}"
NEEDLES_ANSWER = f" {haystack.NEEDLE_ANSWER}"

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

    data = {"haystack": "", "words": ""}
    max_new_tokens = 128
    needles: ClassVar[Needles]

    def files(self) -> list[Path]:
        return [
            *(haystack.essay_files(self.settings) if self._in_prose else []),
            *self._word_files(),
        ]

    @property
    def _in_prose(self) -> bool:
        return self.needles.haystack == "essay"

    def _word_files(self) -> list[Path]:
        if "words" not in (self.needles.key, self.needles.value):
            return []
        return [haystack.word_files(self.settings)[kind] for kind in ("adjective", "noun")]

    def prepare(self) -> None:
        self.least = self.needles.keys * self.needles.values
        self._lists = [haystack.read_words(path) for path in self._word_files()]
        self._essay = haystack.essay_words(self.settings) if self._in_prose else []

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
        words = haystack.needle_words(given.value, [keys[i] for i in asked], single)
        return Sample(
            id=str(index),
            context=NEEDLES_CONTEXT.format(text=text, it="it", **words),
            question=NEEDLES_QUESTION.format(**words),
            answers=tuple(value for i in asked for value in values[i]),
            answer_prefix=NEEDLES_ANSWER.format(**words),
        )

    def _needle(self, key: str, value: str) -> str:
        return haystack.NEEDLE.format(kind=self.needles.value, key=key, value=value)

    def _draw(self, rng: Random, kind: Kind) -> str:
        if kind == "numbers":
            return haystack.random_number(rng, 7)
        if kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        adjectives, nouns = self._lists
        return haystack.random_key(rng, adjectives, nouns)

    def _prose(self, rng: Random, size: int, needles: list[str]) -> str:
        sentences = haystack.sentences_of(self._essay, size)
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        # A place is a share of the text with the needles behind it.
        for depth, needle in reversed(list(zip(depths, needles, strict=True))):
            sentences.insert(len(sentences) * depth // 100, needle)
        return " ".join(sentences)

    def _lines(self, rng: Random, size: int, needles: list[str]) -> str:
        given = self.needles
        lines = [
            " ".join(haystack.NOISE)
            if given.haystack == "noise"
            else self._needle(self._draw(rng, given.key), self._draw(rng, given.value))
            for _ in range(size)
        ]
        places = sorted(rng.sample(range(size), len(needles)))
        haystack.insert_all(lines, places, needles[::-1])  # the last needle stands first
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
for _name, _needles in NEEDLES.items():
    type(_name, (NeedleTask,), {"name": f"ruler_{_name}", "needles": _needles})


# ---- vt: which variables got one value, along a chain of assignments -----------------------------

VT_CONTEXT = haystack.CHAIN_INTRO.format(this="the following") + "\n\n{text}"
VT_QUESTION = f"\nQuestion: {haystack.CHAIN_QUESTION}"
VT_ANSWER = f" Answer: {haystack.CHAIN_ANSWER}"
MISSPELT = "assgined"  # by the benchmark
EXAMPLE_NOISES = 10
LETTERS, EXAMPLE_LETTERS = 5, 3


class VariableTracking(RulerTask):
    """One chain of four hops among noise, after one worked example with shorter names."""

    name = "ruler_vt"
    max_new_tokens = 30

    def draft(self, rng: Random, index: int, size: int) -> Sample:
        text, names, words = _chain(rng, EXAMPLE_NOISES, EXAMPLE_LETTERS)
        worked = (VT_CONTEXT + VT_QUESTION + VT_ANSWER).format(text=text, **words)
        worked += f" {' '.join(names)}\n"
        text, names, words = _chain(rng, size, LETTERS)
        return Sample(
            id=str(index),
            context=worked + VT_CONTEXT.format(text=text),
            question=VT_QUESTION.format(**words),
            answers=tuple(names),
            answer_prefix=VT_ANSWER.format(**words),
        )


def _chain(rng: Random, noises: int, letters: int) -> tuple[str, list[str], dict[str, str]]:
    """The text, the names of the chain, and what question and answer are filled with."""
    names = haystack.made_up_words(rng, haystack.VARIABLES, letters)
    value = haystack.random_number(rng, 5)
    lines = [" ".join(haystack.NOISE)] * noises
    places = sorted(rng.choices(range(noises + 1), k=len(names)))
    haystack.insert_all(lines, places, haystack.assignments(names, value))
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
    data = {"words": ""}
    max_new_tokens = 120
    least = COMMON

    def files(self) -> list[Path]:
        return list(dict.fromkeys(haystack.word_files(self.settings).values()))

    def prepare(self) -> None:
        self._words = sorted({word for path in self.files() for word in haystack.read_words(path)})
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
            *haystack.made_up_words(rng, count, MADE_UP_LETTERS, string.ascii_lowercase),
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
    data = {"squad": "squad_dev_short.jsonl.gz"}


class HotpotQA(DocumentTask):
    name = "ruler_qa_2"
    data = {"hotpotqa": "hotpotqa_dev.jsonl.gz"}

    def documents_of(self, context: str) -> list[str]:
        """Paragraphs, each under its title, with a blank line between them."""
        return [text.strip() for text in context.split("\n\n") if text.strip()]
