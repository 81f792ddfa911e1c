"""Needles by length and depth: the synthetic tasks that heads are trained on, with other
seeds.

Sample number i stands at depth number i of `depths`; a second round of depths asks other needles a
little further up or down, and so on. A prompt's text has `length` tokens; chat template and answer
come on top.
"""

from pathlib import Path

from locret.tasks import synthetic
from locret.tasks.base import Prompts, Sample, SizedTask
from locret.tasks.metrics import whole_words_found

FIRST_SEED = 1_000_000
"""Heads are trained on samples of smaller seeds."""

HAYSTACK = "needle_haystack"
"""Names the haystack among a configuration's data: a text file, or one of `HAYSTACKS`."""

HAYSTACKS = {"noise": "noise", "reference": None}
"""Haystacks that need no file; the reference is CPython's of its language."""


class NeedleTask(SizedTask):
    """Name what is hidden in a long text. `found`: everything asked for is in the answer; `part`:
    the share of it that is."""

    metrics = ("found", "part")
    max_new_tokens = 32

    def files(self) -> list[Path]:
        given = self._haystack
        return [] if given in HAYSTACKS else [self.settings.file(HAYSTACK, given)]

    @property
    def _haystack(self) -> str:
        return self.settings.data.get(HAYSTACK, "noise")

    def samples(self, limit: int | None, prompts: Prompts | None) -> list[Sample]:
        """One for each depth, if no limit is given."""
        assert prompts is not None
        count = self.settings.depths if limit is None else limit
        return [self._sample(number, prompts) for number in range(count)]

    def _sample(self, number: int, prompts: Prompts) -> Sample:
        files = self.files()
        made = synthetic.make_sample(
            self.name,
            self.length,
            prompts.tokenizer,
            FIRST_SEED + self.settings.seed + number,
            depth=depth_of(number, self.settings.depths),
            haystack=str(files[0]) if files else HAYSTACKS[self._haystack],
        )
        return as_sample(made, str(number))

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        part = whole_words_found(answer, sample.answers)
        return {"found": float(part == 1.0), "part": part}


def as_sample(made: synthetic.SyntheticSample, name: str) -> Sample:
    """A synthetic sample as one of an evaluation."""
    return Sample(
        id=name,
        context=made.context,
        question=f"\n\n{made.question}",
        answers=made.expected,
        answer_prefix=made.answer_prefix,
        depth=made.depth,
    )


def depth_of(number: int, depths: int) -> float:
    """Depth of a sample, 0 to 1: in the middle of its share of the haystack in the first round of
    depths, then at a quarter and at three quarters of it, and so on (van der Corput's sequence), so
    that more samples leave the first ones where they are."""
    row, around = number % depths, number // depths + 1
    within = sum((around >> bit & 1) / 2 ** (bit + 1) for bit in range(around.bit_length()))
    return (row + within) / depths


NEEDLE_TASKS: tuple[type[NeedleTask], ...] = tuple(
    type(f"{name.title().replace('_', '')}Needle", (NeedleTask,), {"name": name})
    for name in synthetic.TASKS
)
