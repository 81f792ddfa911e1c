"""RULER's needle tasks: special magic numbers or UUIDs of keys, hidden in a haystack."""

import uuid
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from locret.tasks import wording
from locret.tasks.base import Sample
from locret.tasks.haystack import (
    NOISE,
    essay_files,
    essay_words,
    read_words,
    sentences_of,
    word_files,
)
from locret.tasks.ruler.base import RulerTask

Kind = Literal["numbers", "words", "uuids"]

CONTEXT = wording.NEEDLE_INTRO + "\n{text}"
QUESTION = f"\n{wording.NEEDLE_QUESTION}"
ANSWER = f" {wording.NEEDLE_ANSWER}"

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
            context=CONTEXT.format(text=text, it="it", **words),
            question=QUESTION.format(**words),
            answers=tuple(value for i in asked for value in values[i]),
            answer_prefix=ANSWER.format(**words),
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


class NiahSingle1(NeedleTask):
    name = "ruler_niah_single_1"
    needles = Needles("noise")


class NiahSingle2(NeedleTask):
    name = "ruler_niah_single_2"
    needles = Needles("essay")


class NiahSingle3(NeedleTask):
    name = "ruler_niah_single_3"
    needles = Needles("essay", value="uuids")


class NiahMultikey1(NeedleTask):
    name = "ruler_niah_multikey_1"
    needles = Needles("essay", keys=4)


class NiahMultikey2(NeedleTask):
    name = "ruler_niah_multikey_2"
    needles = Needles("needle")


class NiahMultikey3(NeedleTask):
    name = "ruler_niah_multikey_3"
    needles = Needles("needle", key="uuids", value="uuids")


class NiahMultivalue(NeedleTask):
    name = "ruler_niah_multivalue"
    needles = Needles("essay", values=4)


class NiahMultiquery(NeedleTask):
    name = "ruler_niah_multiquery"
    needles = Needles("essay", keys=4, queries=4)
