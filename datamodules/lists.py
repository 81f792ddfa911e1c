"""Long lists with questions about them, made on the spot: records, and words to count.

In a haystack one sentence stands out; here every line looks like every other one, and any of them
may be asked for, or all of them count.

    - class_path: datamodules.lists.ListSource
      init_args: {tokens: [512, 4096], size: 10000}
"""

from collections.abc import Callable, Sequence
from random import Random
from uuid import UUID

from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation, exchange
from datamodules.sources import lengths
from datamodules.texts import fit
from locret.tasks import wording
from locret.tasks.synthetic import ADJECTIVES, NOUNS

QUESTIONS = 4  # about one list
_COUNTED = 10  # words that are asked for, at most

Questions = list[tuple[str, str]]


def _uuid(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


_NAMES: dict[str, Callable[[Random], str]] = {
    "uuid": _uuid,
    "number": lambda rng: wording.number(rng, rng.choice((5, 7, 9))),
    "words": lambda rng: wording.key(rng, ADJECTIVES, NOUNS),
    "hex": lambda rng: f"{rng.getrandbits(48):012x}",
}
_LINES = (
    "{key}: {value}",
    "The value of {key} is {value}.",
    "{key} = {value}",
    '{{"id": "{key}", "value": "{value}"}}',
    "| {key} | {value} |",
)


def records(rng: Random, tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[str, Questions]:
    """Pairs of names, a line each; some of the values are asked for."""
    of_keys, of_values = (_NAMES[rng.choice([*_NAMES])] for _ in range(2))
    line, keys = rng.choice(_LINES), set[str]()
    lines, pairs = [], []
    for _ in range(tokens // 8):  # more than fit
        key, value = of_keys(rng), of_values(rng)
        if key not in keys:
            keys.add(key)
            pairs.append((key, value))
            lines.append(line.format(key=key, value=value))
    text, _ = fit("\n".join(lines), tokens, tokenizer)
    whole = max(1, text.count("\n"))  # the last line may be cut
    text = "\n".join(lines[:whole])
    asked = [rng.choice(pairs[:whole]) for _ in range(QUESTIONS)]
    return text, [(f"What is the value of {key}?", value) for key, value in dict(asked).items()]


def counts(rng: Random, tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[str, Questions]:
    """Words in any order, a few of them much more often than the others; these are asked for."""
    often = rng.randint(1, _COUNTED)
    words = rng.sample([*ADJECTIVES, *NOUNS], min(len(ADJECTIVES + NOUNS), often + tokens // 20))
    times, most = rng.randint(1, 3), rng.randint(8, 30)
    drawn = words[:often] * most + words[often:] * times
    rng.shuffle(drawn)
    separator = rng.choice((", ", "\n", " ", "; "))
    numbered = rng.random() < 0.5
    items = [f"{i}. {word}" for i, word in enumerate(drawn, 1)] if numbered else drawn
    text, _ = fit(separator.join(items), tokens, tokenizer)
    left = text.split(separator)[:-1] or [text]
    seen = [item.split(". ")[-1] for item in left]
    ranked = sorted(words[:often], key=seen.count, reverse=True)
    what = f"{often} words occur" if often > 1 else "word occurs"
    return separator.join(left), [
        (f"Which {what} most often in the list above?", f"{wording.listing(ranked)}.")
    ]


KINDS = {"records": records, "counts": counts}


class ListSource(Sequence[Conversation]):
    """Lists with questions, made when asked for and the same for one index everywhere.

    Args:
        tokens: of a list, or the (least, most) to draw from evenly; a list has a few fewer.
        size: number of lists.
        kinds: "records", "counts" or both, taken in turn.
        seed: another seed, other lists.

    Raises:
        ValueError: for unknown kinds, lengths that are not 0 < least <= most, or size < 1.
    """

    def __init__(
        self,
        tokens: int | tuple[int, int],
        size: int,
        kinds: Sequence[str] = tuple(KINDS),
        seed: int = 0,
    ) -> None:
        if not kinds or set(kinds) - set(KINDS):
            raise ValueError(f"kinds is {list(kinds)}, expected some of {', '.join(KINDS)}")
        self.kinds = list(kinds)
        self.tokens = lengths(tokens, size)
        self.size = size
        self.seed = seed
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def __str__(self) -> str:
        return f"ListSource({', '.join(self.kinds)}, seed {self.seed})"

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """See `datamodules.sources.Source.load`."""
        self._tokenizer = tokenizer
        return self

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Conversation:  # type: ignore[override]
        i = range(len(self))[i]
        assert self._tokenizer is not None
        rng = Random(f"locret list {self.seed} {i}")
        kind = self.kinds[i % len(self.kinds)]
        text, asked = KINDS[kind](rng, self._tokenizer, rng.randint(*self.tokens))
        questions = tuple((f"\n\n{question}", answer) for question, answer in asked)
        messages = exchange(text + questions[0][0], questions[0][1])
        name = f"{kind}:{self.seed}:{i}"
        return Conversation(messages, f"lists/{kind}", name, context=text, questions=questions)
