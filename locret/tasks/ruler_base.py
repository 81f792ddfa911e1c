"""What the tasks of RULER (Hsieh et al., arXiv 2404.06654) share: a haystack cut to a length.

A task drafts a sample around so many units of haystack (words, sentences, documents). How many fit
is found on the first sample; a sample that turns out too long gets fewer. Sample number i depends
on the seed and i alone, so the first samples are the same however many are asked for.
Made samples are kept in files by what they depend on: task, length, seed, data, tokenizer.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from locret.system.files import write_whole
from locret.tasks.base import Prompts, Sample, SizedTask
from locret.tasks.metrics import string_match_all, without_controls

Measure = Callable[[Sample], int]
"""Tokens of a sample's rendered prompt."""

DEFAULT_SAMPLES = 500
SHRINK = 0.01  # of the haystack, where a sample is longer than the first one


class MadeTask(SizedTask):
    """A task whose prompt, chat template and answer fit `length` tokens; made samples are kept."""

    @abstractmethod
    def made(self, count: int, prompts: Prompts) -> list[Sample]:
        """The first `count` samples, or as many as there are."""

    def samples(self, limit: int | None, prompts: Prompts | None) -> list[Sample]:
        assert prompts is not None
        count = DEFAULT_SAMPLES if limit is None else limit
        if self.settings.cache_dir is None:
            return self.made(count, prompts)
        path = self._path(self.settings.cache_dir, prompts.fingerprint)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ["0"]
        if int(lines[0]) >= count:
            return [_sample(line) for line in lines[1:]][:count]
        samples = self.made(count, prompts)
        rows = [str(count), *(json.dumps(asdict(sample)) for sample in samples)]
        write_whole(path, "\n".join(rows) + "\n")
        return samples

    def _path(self, folder: Path, fingerprint: str) -> Path:
        depends_on: dict[str, Any] = {
            "version": self.version,
            "seed": self.settings.seed,
            "tokenizer": fingerprint,
            "files": list(self.origins().values()),
        }
        if self.settings.max_new_tokens is not None:
            depends_on["max_new_tokens"] = self.settings.max_new_tokens  # a part of the length
        key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
        return folder / "samples" / f"{self.name}-{self.length}-{key}.jsonl"

    def does_not_fit(self) -> ValueError:
        return ValueError(
            f"{self.name} does not fit {self.length} tokens with {self.max_new_tokens} for the "
            "answer; ask for a larger length"
        )


class RulerTask(MadeTask):
    """A task made of so many units of haystack, `least` to `most` of them; None = as many as
    fit."""

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
        measure = prompts.measure
        size, available = self._size(measure), self.available()
        indices = range(count if available is None else available)
        made = (self._longest(index, size, measure) for index in indices)
        found = list(islice((sample for sample in made if sample is not None), count))
        if not found:
            raise self.does_not_fit()
        return found

    def _size(self, measure: Measure) -> int:
        """The most units of haystack that fit the first sample; `least` if none do."""
        fits, beyond = self.least, self.least + 1
        while self.most is None or beyond <= self.most:
            if self._fitting(0, beyond, measure) is None:
                break
            fits, beyond = beyond, 2 * beyond
        beyond = beyond if self.most is None else min(beyond, self.most + 1)
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if self._fitting(0, middle, measure) is None:
                beyond = middle
            else:
                fits = middle
        return fits

    def _longest(self, index: int, size: int, measure: Measure) -> Sample | None:
        """The sample with as much haystack as fits; None if it does not fit at all."""
        step = max(1, int(size * SHRINK))
        sizes = (max(fewer, self.least) for fewer in range(size, self.least - step, -step))
        drafts = (self._fitting(index, fewer, measure) for fewer in sizes)
        return next((sample for sample in drafts if sample is not None), None)

    def _fitting(self, index: int, size: int, measure: Measure) -> Sample | None:
        """The sample, if it fits."""
        rng = Random(f"ruler {self.name} {self.settings.seed} {index}")
        sample = self.draft(rng, index, size)
        return sample if measure(sample) + self.max_new_tokens <= self.length else None


def _sample(line: str) -> Sample:
    row = json.loads(line)
    return Sample(**row | {"answers": tuple(row["answers"])})
