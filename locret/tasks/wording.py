"""RULER's wording of needles and of chains of variables, and how what they hold is drawn.

The benchmark's own tasks (`locret.tasks.ruler`) and those that heads are trained on
(`locret.tasks.synthetic`) ask in these words. What differs between the two is named in braces.
"""

import string
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NEEDLE_INTRO = (
    "{Some} special magic {kind} {are} hidden within the following text. Make sure to memorize "
    "{it}. I will quiz you about the {kind} afterwards."
)
NEEDLE_QUESTION = (
    "What {are_all} the special magic {kind} for {keys} mentioned in the provided text?"
)
NEEDLE_ANSWER = "The special magic {kind} for {keys} mentioned in the provided text {are}"
ONE = {"Some": "A", "are": "is", "are_all": "is"}
MANY = {"Some": "Some", "are": "are", "are_all": "are all"}

CHAIN_INTRO = "Memorize and track the chain(s) of variable assignment hidden in {this} text."
CHAIN_QUESTION = "Find all variables that are assigned the value {value} in the text above."
CHAIN_ANSWER = (
    "According to the chain(s) of variable assignment in the text above, {count} variables are "
    "{assigned} the value {value}, they are:"
)
VARIABLES = 5  # of one chain: four hops

T = TypeVar("T")


def listing(items: Sequence[str]) -> str:
    """`a`, or `a, and b`, or `a, b, and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def needle_words(kinds: str, keys: Sequence[str], single: bool) -> dict[str, str]:
    """What fills question and answer when values of these kinds are asked for, or a single one."""
    kind = kinds.removesuffix("s") if single else kinds
    return (ONE if single else MANY) | {"kind": kind, "keys": listing(keys)}


def assignments(names: Sequence[str], value: str) -> list[str]:
    """The first name gets the value, each other one the name before it."""
    sources = [value, *(f"VAR {name}" for name in names)]
    return [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]


def number(rng: Random, digits: int) -> str:
    """A number of so many digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def key(rng: Random, adjectives: Sequence[str], nouns: Sequence[str]) -> str:
    """Two words that no text holds side by side."""
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def made_up_words(
    rng: Random, count: int, letters: int, alphabet: str = string.ascii_uppercase
) -> list[str]:
    """So many different words of so many letters drawn from an alphabet."""
    return distinct(lambda: "".join(rng.choices(alphabet, k=letters)), count)


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """So many different strings, in the order in which they are drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def insert_all(items: list[T], places: Sequence[int], inserted: Sequence[T]) -> None:
    """Put each of `inserted` at its place among the items as they are now; places rise."""
    # From the last to the first: an insertion moves only what stands behind it.
    for place, item in reversed(list(zip(places, inserted, strict=True))):
        items.insert(place, item)
