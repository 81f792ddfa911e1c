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

from datamodules.conversations import Conversation, about
from datamodules.sources import MadeSource
from datamodules.texts import count, fit
from locret.tasks.haystack import listing, random_key, random_number
from locret.tasks.synthetic import ADJECTIVES, NOUNS

QUESTIONS = 4  # about one list
LEAST = 128  # tokens of a list: a line of two UUIDs in one token a character
_COUNTED = 10  # words that are asked for, at most
_WORDS = 100  # of a list of them

Questions = list[tuple[str, str]]


def _uuid(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


_NAMES: dict[str, Callable[[Random], str]] = {
    "uuid": _uuid,
    "number": lambda rng: random_number(rng, rng.choice((5, 7, 9))),
    "words": lambda rng: random_key(rng, ADJECTIVES, NOUNS),
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
    for _ in range(tokens // 4):  # more than fit
        key, value = of_keys(rng), of_values(rng)
        if key not in keys:
            keys.add(key)
            pairs.append((key, value))
            lines.append(line.format(key=key, value=value))
    text, _ = fit("\n".join(lines), tokens, tokenizer)
    whole = max(1, text.count("\n"))  # the last line may be cut
    asked = rng.sample(pairs[:whole], min(whole, QUESTIONS))
    questions = [(f"What is the value of {key}?", value) for key, value in asked]
    return "\n".join(lines[:whole]), questions


def counts(rng: Random, tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[str, Questions]:
    """Words in any order, a few of them more often than each of the others; these are asked for, in
    the order in which they come first."""
    words = rng.sample([*ADJECTIVES, *NOUNS], _WORDS)
    often = rng.randint(1, min(_COUNTED, tokens // 40))  # all fit twice
    share, numbered = rng.uniform(0.3, 0.7), rng.random() < 0.5
    separator = rng.choice((", ", "\n", " ", "; "))
    size, found = tokens // 2, tokens + 1  # more than fit
    while found > tokens:  # a list that was cut might have other words most often
        drawn = _drawn(words, often, size, share)
        rng.shuffle(drawn)
        items = [f"{i}. {word}" for i, word in enumerate(drawn, 1)] if numbered else drawn
        text = separator.join(items)
        found = count(text, tokenizer)
        size = int(len(drawn) * min(tokens / found, 1) * 0.998)
    asked = sorted(words[:often], key=drawn.index)
    what = f"{often} words occur" if often > 1 else "word occurs"
    return text, [(f"Which {what} most often in the list above?", f"{listing(asked)}.")]


def _drawn(words: Sequence[str], often: int, size: int, share: float) -> list[str]:
    """So many words, or a few fewer: the first `often` have that share of them."""
    times = max(2, int(size * share / often))
    others = [*words[often:]] * (times - 1)  # each of them less often
    return [*words[:often]] * times + others[: max(0, size - often * times)]


KINDS = {"records": records, "counts": counts}


class ListSource(MadeSource):
    """Lists with questions.

    Args:
        tokens: of a list, at least 128, or the (least, most) to draw from evenly; a list has a few
            fewer.
        size: number of lists.
        kinds: "records", "counts" or both, taken in turn.
        seed: another seed, other lists.

    Raises:
        ValueError: for unknown kinds, lengths that are not 128 <= least <= most, or size < 1.
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
        super().__init__(tokens, size, seed, LEAST)

    def __str__(self) -> str:
        return f"ListSource({', '.join(self.kinds)}, seed {self.seed})"

    def make(self, i: int, tokenizer: PreTrainedTokenizerBase) -> Conversation:
        rng = Random(f"locret list {self.seed} {i}")
        kind = self.kinds[i % len(self.kinds)]
        text, asked = KINDS[kind](rng, tokenizer, rng.randint(*self.tokens))
        return about(text, asked, f"lists/{kind}", f"{kind}:{self.seed}:{i}")
