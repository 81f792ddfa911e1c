"""Seeded long-context tasks over ordinary prose: needles in a haystack, chains, quotations; to
train on, and with other seeds to evaluate.

Every sample is a pure function of (task, tokens, rng_seed, depth, tokenizer, haystack), in this
process and in any other: heads were trained on them, so that they may not change. The needle and
variable tasks are worded as RULER's, so that scores can be compared in kind; the haystack
(`locret.tasks.haystack`) is CPython's language reference or a text file.

    sample = make_sample("niah_single", tokens=4096, tokenizer=tokenizer, rng_seed=0)
    prompt_text(sample), sample.answer, sample.score("... 7301942")
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from locret.tasks import haystack
from locret.tasks.base import Prompts, Sample, SizedTask
from locret.tasks.haystack import Haystack, load_haystack
from locret.tasks.metrics import whole_words_found

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient bitter brave bright broken calm careful clever cold copper crooked curious "
    "dark dusty eager early empty faint fancy gentle giant golden grey happy hidden hollow honest "
    "humble icy idle jolly keen late lively lone lucky mellow mighty misty narrow noble odd pale "
    "patient plain polite proud quick quiet rapid rough rusty shy silent silver simple sleepy "
    "slow smooth solemn steady stormy strange sturdy sunny swift tame tender thirsty tidy tiny "
    "velvet warm wild wise witty young"
)
NOUNS = _words(
    "acorn anchor apron arrow badger barley basket beacon beetle bell blanket bottle bridge "
    "bucket button cabin candle canoe carrot castle cellar chapel cherry clock cloud comet cradle "
    "cricket curtain dagger donkey drum eagle engine falcon feather ferry fiddle forest fountain "
    "garden ginger glacier goblet hammer harbor hazel helmet island jacket kettle ladder lantern "
    "lemon lizard magnet maple meadow mirror mitten needle orchard otter paddle pebble pepper "
    "pigeon pillow planet quilt rabbit ribbon river rocket saddle sparrow spoon stable teapot "
    "thimble ticket tunnel turnip violin wagon walnut whistle willow window"
)
N_KEYS = 4  # keys of multikey and multiquery, values of multivalue (RULER's default)


@dataclass(frozen=True)
class SyntheticSample:
    """One question about one long text.

    Attributes:
        task: a name in `TASKS`.
        context: the text, needles included, with the line that introduces it.
        question: the question, to be put after the context (see `prompt_text`).
        answer: what a model should say; contains every string of `expected`.
        expected: the strings that a right answer holds.
        depth: where the first string asked for stands, 0 = start and 1 = end of the haystack; None
            for a task without such a place (each task here has one).
    """

    task: str
    context: str
    question: str
    answer: str
    expected: tuple[str, ...]
    depth: float | None

    @property
    def answer_prefix(self) -> str:
        """The answer up to the first expected string: given to a model, it need only retrieve."""
        first = min(self.answer.index(wanted) for wanted in self.expected)
        return self.answer[:first].rstrip()

    def score(self, generated: str) -> float:
        """Fraction of `expected` found in a generated answer, 0 to 1."""
        return whole_words_found(generated, self.expected)


@dataclass(frozen=True)
class _Quiz:
    """A task before it is laid into the haystack.

    `needles` are (text, depth) in the order in which they must stand. The filler runs on from
    sentence `anchor`; with a `gap`, that many sentences from there on are the needle itself, and
    the filler surrounds them.
    """

    intro: str
    needles: tuple[tuple[str, float], ...]
    question: str
    answer: str
    expected: tuple[str, ...]
    depth: float
    anchor: int
    gap: int = 0


def prompt_text(sample: SyntheticSample) -> str:
    """The whole user prompt: context, blank line, question."""
    return f"{sample.context}\n\n{sample.question}"


# ---- tasks ---------------------------------------------------------------------------------------


def _depths(rng: Random, n: int, depth: float | None) -> list[float]:
    """n depths in reading order; a given depth is the first, the others follow it."""
    drawn = sorted(rng.random() for _ in range(n))
    return drawn if depth is None else [depth, *(depth + (1 - depth) * d for d in drawn[1:])]


def _passkey(rng: Random, hay: Haystack, depth: float | None) -> _Quiz:
    key, (place,) = haystack.random_number(rng, 5), _depths(rng, 1, depth)
    return _Quiz(
        intro="There is an important info hidden inside a lot of irrelevant text. Find it and "
        "memorize it. I will quiz you about the important information there.",
        needles=((f"The pass key is {key}. Remember it. {key} is the pass key.", place),),
        question="What is the pass key?",
        answer=f"The pass key is {key}.",
        expected=(key,),
        depth=place,
        anchor=rng.randrange(len(hay)),
    )


def _niah(
    rng: Random, hay: Haystack, depth: float | None, keys: int, values: int, queries: int
) -> _Quiz:
    """`keys` keys with `values` numbers each; the question asks for the first `queries` keys."""
    names = haystack.distinct(lambda: haystack.random_key(rng, ADJECTIVES, NOUNS), keys)
    numbers = haystack.distinct(lambda: haystack.random_number(rng, 7), keys * values)
    n_asked = queries * values
    places = _depths(rng, n_asked, depth) + [rng.random() for _ in numbers[n_asked:]]
    needles = [
        (haystack.NEEDLE.format(kind="numbers", key=names[i // values], value=value), places[i])
        for i, value in enumerate(numbers)
    ]
    expected = numbers[:n_asked]
    words = haystack.needle_words("numbers", names[:queries], single=n_asked == 1)
    answer = haystack.NEEDLE_ANSWER.format(**words)
    return _Quiz(
        intro=haystack.NEEDLE_INTRO.format(**haystack.MANY, kind="numbers", it="them"),
        needles=tuple(sorted(needles, key=lambda needle: needle[1])),
        question=haystack.NEEDLE_QUESTION.format(**words),
        answer=f"{answer} {haystack.listing(expected)}.",
        expected=tuple(expected),
        depth=places[0],
        anchor=rng.randrange(len(hay)),
    )


def _variable_tracking(rng: Random, hay: Haystack, depth: float | None) -> _Quiz:
    value, places = haystack.random_number(rng, 5), _depths(rng, haystack.VARIABLES, depth)
    names = haystack.made_up_words(rng, haystack.VARIABLES, letters=5)
    needles = [f"{assigned}." for assigned in haystack.assignments(names, value)]
    words = {"count": haystack.VARIABLES, "assigned": "assigned", "value": value}
    return _Quiz(
        intro=haystack.CHAIN_INTRO.format(this="this"),
        needles=tuple(zip(needles, places, strict=True)),
        question=haystack.CHAIN_QUESTION.format(value=value),
        answer=f"{haystack.CHAIN_ANSWER.format(**words)} {haystack.listing(names)}.",
        expected=tuple(names),
        depth=places[0],
        anchor=rng.randrange(len(hay)),
    )


def _next_sentence(rng: Random, hay: Haystack, depth: float | None) -> _Quiz:
    """The quoted sentence and its successor keep their place: the haystack is laid around them."""
    anchor, (place,) = rng.randrange(len(hay) - 1), _depths(rng, 1, depth)
    quoted, following = hay[anchor : anchor + 2]
    return _Quiz(
        intro="Read the following text carefully. I will quote one of its sentences afterwards.",
        needles=((f"{quoted} {following}", place),),
        question=f"Which sentence comes directly after this sentence in the text above?\n{quoted}",
        answer=following,
        expected=(following,),
        depth=place,
        anchor=anchor,
        gap=2,
    )


TASKS: dict[str, Callable[[Random, Haystack, float | None], _Quiz]] = {
    "passkey": _passkey,
    "niah_single": partial(_niah, keys=1, values=1, queries=1),
    "niah_multikey": partial(_niah, keys=N_KEYS, values=1, queries=1),
    "niah_multivalue": partial(_niah, keys=1, values=N_KEYS, queries=1),
    "niah_multiquery": partial(_niah, keys=N_KEYS, values=1, queries=N_KEYS),
    "variable_tracking": _variable_tracking,
    "next_sentence": _next_sentence,
}

# ---- laying out ----------------------------------------------------------------------------------


def make_sample(
    task: str,
    tokens: int,
    tokenizer: "PreTrainedTokenizerBase",
    rng_seed: int,
    depth: float | None = None,
    haystack: str | Path | None = None,
) -> SyntheticSample:
    """Make one sample whose `prompt_text` is close to, and never above, a number of tokens.

    Args:
        task: a name in `TASKS`.
        tokens: bound on the tokens of `prompt_text(sample)`, counted without special tokens. The
            prompt falls short of it by less than about one sentence. A chat template comes on top.
        tokenizer: counts the tokens; its first use costs a pass over the haystack.
        rng_seed: decides keys, values, places and where in the haystack the text starts. They do
            not depend on `tokens`, so one seed can be compared at several lengths.
        depth: where the string asked for stands, 0 to 1 of the haystack's sentences; with several
            strings the first one, the others follow at random. None draws it.
        haystack: path of a text file, or "noise"; None is CPython's language reference.

    Raises:
        ValueError: for an unknown task, a depth outside 0 to 1, an unusable haystack, or too few
            tokens to hold the needles and the question (the message gives the least number).
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}, expected a number from 0 (start) to 1 (end)")
    hay = load_haystack(haystack)
    # A string seeds by its SHA-512, the same in every process; hash() of a string is not.
    # Without the number of tokens: one seed asks the same at every length, in more or less text.
    quiz = TASKS[task](Random(f"locret {task} {rng_seed}"), hay, depth)
    return _sample(task, quiz, hay, _fit(quiz, hay, tokens, tokenizer))


def _sample(task: str, quiz: _Quiz, hay: Haystack, n: int) -> SyntheticSample:
    """The sample with n sentences of filler."""
    filler = [hay[i] for i in _filler(quiz, len(hay), n)]
    places = [round(depth * n) for _, depth in quiz.needles]
    haystack.insert_all(filler, places, [text for text, _ in quiz.needles])
    context = f"{quiz.intro}\n\n{' '.join(filler)}"
    return SyntheticSample(task, context, quiz.question, quiz.answer, quiz.expected, quiz.depth)


def _filler(quiz: _Quiz, length: int, n: int) -> list[int]:
    """Indices of n consecutive sentences around the anchor, which wrap at the end of the text."""
    before = round(quiz.depth * n) if quiz.gap else 0
    return [
        (quiz.anchor + i + (quiz.gap if i >= 0 else 0)) % length for i in range(-before, n - before)
    ]


def _fit(quiz: _Quiz, hay: Haystack, tokens: int, tokenizer: "PreTrainedTokenizerBase") -> int:
    """The number of filler sentences that brings the prompt closest to `tokens` from below.

    Counts of single sentences add up only nearly, so the estimate is measured and corrected until
    it stays.
    """

    def measure(n: int) -> int:
        text = prompt_text(_sample("", quiz, hay, n))
        # verbose=False: a text above model_max_length is meant, and no reason for a warning.
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    least = measure(0)
    if least > tokens:
        raise ValueError(f"tokens is {tokens}, too few for this sample; it needs at least {least}")
    counts = _sentence_counts(tokenizer, hay)
    budget, best, tried = tokens - least, 0, {0}
    while (n := _most(quiz, counts, budget)) not in tried:
        tried.add(n)
        spare = tokens - measure(n)
        best = max(best, n) if spare >= 0 else best
        budget = sum(counts[i] for i in _filler(quiz, len(counts), n)) + spare
    return best


def _most(quiz: _Quiz, counts: Sequence[int], budget: int) -> int:
    """The most filler sentences whose counts add up to no more than the budget."""
    if budget <= 0:
        return 0
    if not quiz.gap:  # the filler starts at the anchor: one pass
        rest = budget % sum(counts)
        rotated = list(accumulate([*counts[quiz.anchor :], *counts[: quiz.anchor]]))
        return budget // sum(counts) * len(counts) + bisect_right(rotated, rest)

    def total(n: int) -> int:
        return sum(counts[i] for i in _filler(quiz, len(counts), n))

    # A longer filler holds the shorter one, so the totals are in order.
    return bisect_right(range(1, budget // min(counts) + 1), budget, key=total)


_COUNTS: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[Haystack, list[int]]]" = (
    WeakKeyDictionary()
)


def _sentence_counts(tokenizer: "PreTrainedTokenizerBase", hay: Haystack) -> list[int]:
    """Tokens of each sentence and the space before it, at least 1."""
    by_haystack = _COUNTS.setdefault(tokenizer, {})
    if hay not in by_haystack:
        rows = tokenizer([f" {s}" for s in hay], add_special_tokens=False)["input_ids"]
        by_haystack[hay] = [max(1, len(row)) for row in rows]
    return by_haystack[hay]


# ---- as tasks of an evaluation, by length and depth ----------------------------------------------

FIRST_SEED = 1_000_000
"""Heads are trained on samples of smaller seeds."""

HAYSTACK = "needle_haystack"
"""Names the haystack among a configuration's data: a text file, or one of `HAYSTACKS`."""

HAYSTACKS = {"noise": "noise", "reference": None}
"""Haystacks that need no file; the reference is CPython's of its language."""


class NeedleTask(SizedTask):
    """Name what is hidden in a long text. `found`: everything asked for is in the answer; `part`:
    the share of it that is.

    Sample number i stands at depth number i of `depths`; a second round of depths asks other
    needles a little further up or down, and so on. A prompt's text has `length` tokens; chat
    template and answer come on top.
    """

    group = "needles"
    data = {HAYSTACK: ""}
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
        made = make_sample(
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


def as_sample(made: SyntheticSample, name: str) -> Sample:
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


for _name in TASKS:
    type(f"{_name.title().replace('_', '')}Needle", (NeedleTask,), {"name": _name})
