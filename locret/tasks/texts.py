"""Seeded texts of many kinds to train on, so that a machine without data can train.

    TEXTS["logs"](Random(0), 2000)      # a log of about 2,000 tokens

Heads that are trained on replay (`datamodules.encoder`) learn from any text what a model needs to
say it again; they should have met what people put into prompts: lists, tables, JSON, identifiers,
code, logs, dialogues and prose. Every text is a pure function of the generator's state and the
number of tokens; code and prose come from CPython's standard library and differ with its version.
"""

import json
import re
import string
import sysconfig
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import lru_cache, partial
from itertools import accumulate, count
from pathlib import Path
from random import Random
from uuid import UUID

from locret.tasks.haystack import load_haystack, made_up_words, random_number
from locret.tasks.synthetic import ADJECTIVES, NOUNS

TextKind = Callable[[Random, int], str]
"""(generator, approximate tokens) -> text."""

_FIRST, _LAST, _CITIES = (
    names.split()
    for names in (
        "Ada Bruno Chen Dalia Emeka Farid Greta Hana Ivo Jonas Kira Lena Mateo Nadia Omar Priya "
        "Quinn Rosa Sven Tariq Uma Viktor Wanda Yusuf Zoe",
        "Abara Bauer Costa Dimitrov Eriksen Fuentes Garcia Haddad Ivanova Jensen Kowalski "
        "Lindqvist Moreau Novak Okafor Petrov Quispe Rossi Sato Tanaka Ueda Vargas Weber Yilmaz",
        "Accra Bergen Bogota Cork Dakar Fukuoka Ghent Graz Hanoi Izmir Kyoto Leeds Lima Lyon Malmo "
        "Mumbai Nantes Oslo Porto Quito Riga Seville Split Tampere Utrecht Zagreb",
    )
)
_STATES = ("open", "closed", "pending", "failed", "shipped", "returned", "on hold")
_SERVICES = ("auth", "billing", "cache", "gateway", "mailer", "scheduler", "search", "storage")

# ---- what texts are made of ----------------------------------------------------------------------


def _approximate_tokens(text: str) -> int:
    """Tokens as common vocabularies cut text: digits and signs one each, letters five or so."""
    return len(re.findall(r"\d|[A-Za-z]{1,6}|[^\w ]|\w", text))


def _fill(pieces: Callable[[Random], Iterator[str]], rng: Random, tokens: int) -> str:
    """Pieces one after the other, until there are enough tokens."""
    made: list[str] = []
    for piece in pieces(rng):
        made.append(piece)
        tokens -= _approximate_tokens(piece)
        if tokens <= 0:
            break
    return "".join(made).strip()


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[str, ...]:
    """Words of the prose that ships with CPython, each once."""
    prose = " ".join(load_haystack(None))
    return tuple(sorted(set(re.findall(r"\b[a-z]{3,12}\b", prose)) | {*ADJECTIVES, *NOUNS}))


def _uuid(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


def _name(rng: Random) -> str:
    return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"


def _thing(rng: Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _time(rng: Random) -> datetime:
    return datetime(2018, 1, 1) + timedelta(seconds=rng.randrange(8 * 365 * 86400))


_FIELDS: dict[str, Callable[[Random], str | int | float]] = {
    "name": _name,
    "city": lambda rng: rng.choice(_CITIES),
    "item": _thing,
    "date": lambda rng: _time(rng).date().isoformat(),
    "amount": lambda rng: round(rng.lognormvariate(4, 1.5), 2),
    "quantity": lambda rng: rng.randrange(1, 500),
    "phone": lambda rng: f"+{rng.randrange(1, 99)} {random_number(rng, 9)}",
    "status": lambda rng: rng.choice(_STATES),
    "code": lambda rng: made_up_words(rng, 1, 3)[0] + random_number(rng, 4),
    "number": lambda rng: random_number(rng, rng.randint(4, 9)),
    "uuid": _uuid,
    "email": lambda rng: f"{rng.choice(_FIRST).lower()}@{rng.choice(NOUNS)}.example",
    "share": lambda rng: f"{rng.random() * 100:.1f}%",
    "word": lambda rng: rng.choice(_vocabulary()),
}
"""What tables, records and sentences tell, and how it is drawn."""


def _tell(rng: Random, sentence: str) -> str:
    """A sentence with the fields that it names in braces, each drawn anew; `item2` is an item."""
    names = re.findall(r"{(\w+)}", sentence)
    return sentence.format(**{name: _FIELDS[name.rstrip("2")](rng) for name in names})


def _records(rng: Random) -> tuple[list[str], Iterator[list[str | int | float]]]:
    """Names of some fields with an "id" in front, and endless records of them."""
    names = rng.sample(list(_FIELDS), rng.randint(2, 6))
    first, step = rng.randrange(1, 9000), rng.choice((1, 1, 7))
    rows = ([i, *(_FIELDS[name](rng) for name in names)] for i in count(first, step))
    return ["id", *names], rows


@lru_cache(maxsize=1)
def _code_files() -> tuple[Path, ...]:
    """CPython's own modules, of its standard library's top folder and of some packages in it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = (".", "asyncio", "collections", "concurrent/futures", "email", "http", "importlib")
    return tuple(sorted(path for folder in folders for path in (root / folder).glob("*.py")))


# ---- kinds ---------------------------------------------------------------------------------------


def _listed(rng: Random, words: Iterator[str]) -> Iterator[str]:
    """Words in one of the ways in which people write lists."""
    form = rng.choice(
        ("{0}\n", "{0}, ", "{0} ", "- {0}\n", "{1}. {0}\n", "({1}) {0}; ", "{1}: {0} ")
    )
    return (form.format(word, i) for i, word in enumerate(words, start=1))


def _words(rng: Random) -> Iterator[str]:
    """Words with little order, each about as rare as the other."""
    pool = rng.sample(_vocabulary(), rng.choice((200, 2000)))
    return _listed(rng, (rng.choice(pool) for _ in count()))


def _repeated_words(rng: Random) -> Iterator[str]:
    """A few words many times among many words a few times."""
    if rng.random() < 0.4:  # each word a little rarer than the one before it
        drawn = made_up_words(rng, 300, 6, string.ascii_lowercase)
        weights = [1 / (rank + 1) for rank in range(300)]
    else:
        drawn, often = rng.sample(_vocabulary(), 300), rng.randint(3, 12)
        weights = [rng.uniform(15, 40)] * often + [1.0] * (300 - often)
    bounds = list(accumulate(weights))
    return _listed(rng, (rng.choices(drawn, cum_weights=bounds)[0] for _ in count()))


def _numbers(rng: Random) -> Iterator[str]:
    digits, wide = rng.randint(1, 9), rng.randint(1, 8)
    decimal = rng.random() < 0.3
    for i in count(1):
        number = random_number(rng, digits)
        number = f"{number}.{random_number(rng, 2)}" if decimal else number
        yield number + ("\n" if i % wide == 0 else " ")


def _csv(rng: Random) -> Iterator[str]:
    names, rows = _records(rng)
    sign = rng.choice((",", ",", ";", "\t"))
    yield sign.join(names) + "\n"
    yield from (sign.join(map(str, row)) + "\n" for row in rows)


def _markdown_table(rng: Random) -> Iterator[str]:
    names, rows = _records(rng)
    yield f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    yield from (f"| {' | '.join(map(str, row))} |\n" for row in rows)


def _json(rng: Random) -> Iterator[str]:
    names, rows = _records(rng)
    indent = rng.choice((None, None, 2))
    nested = rng.random() < 0.3
    for row in rows:
        record: dict[str, object] = dict(zip(names, row, strict=True))
        if nested:
            record["contact"] = {"name": _name(rng), "tags": rng.sample(NOUNS, rng.randint(1, 4))}
        yield json.dumps(record, indent=indent) + "\n"


def _keys(rng: Random) -> Iterator[str]:
    """Keys and values that nothing tells but the text: identifiers, codes, numbers."""
    form = rng.choice(("{}: {}\n", "{} = {}\n", '"{}": "{}",\n', "{} -> {}\n"))
    key = rng.choice((_uuid, lambda rng: _thing(rng).replace(" ", "_"), _FIELDS["code"]))
    value = rng.choice((_uuid, _uuid, lambda rng: random_number(rng, 7), _thing))
    return (form.format(key(rng), value(rng)) for _ in count())


def _code(rng: Random) -> Iterator[str]:
    """Files, the first one from a definition on."""
    for _ in count():
        path = rng.choice(_code_files())
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        starts = [0, *(i for i, line in enumerate(lines) if line.startswith(("def ", "class ")))]
        yield f"# {path.name}\n"
        yield from lines[rng.choice(starts) :]
        yield "\n\n"


_EVENTS = (
    "request {uuid} took {quantity} ms",
    "user {email} logged in from 10.0.{quantity}.7",
    "retry of job {number} after {quantity} s",
    "wrote {number} bytes to /var/data/{word}-{quantity}.bin",
    "order {code} of {name} is {status}",
    "queue {word} has {quantity} messages, disk at {share}",
)


def _logs(rng: Random) -> Iterator[str]:
    at, service = _time(rng), rng.choice(_SERVICES)
    for _ in count():
        at += timedelta(milliseconds=rng.randrange(1, 60_000))
        level = rng.choices(("INFO", "DEBUG", "WARNING", "ERROR"), (8, 4, 2, 1))[0]
        name = service if rng.random() < 0.5 else rng.choice(_SERVICES)
        event = _tell(rng, rng.choice(_EVENTS))
        yield f"{at.isoformat(sep=' ', timespec='milliseconds')} {level:7} {name}: {event}\n"


_TURNS = (
    ("Where did you leave the {item}?", "At {name}'s place in {city}, next to the {item2}."),
    ("How much was the {item}?", "{amount} euros, and {amount2} more for the {item2}."),
    ("When does {name} arrive?", "On {date}, with the train from {city}."),
    ("Did you send {name} the {item}?", "Yes, on {date}. The tracking number is {number}."),
    ("What is {name}'s number again?", "It is {phone}, but write to {email} first."),
    ("Who wanted the {item}?", "{name} did, and offered {quantity} of {item2} for it."),
    ("Can we meet in {city}?", "Only after {date}; until then I am with {name}."),
    ("I read about a {item} today.", "Funny, {name} talked of nothing but a {item2}."),
)


def _dialogue(rng: Random) -> Iterator[str]:
    """Two people who talk about things, people, places and numbers."""
    speakers, end = rng.sample(_FIRST, 2), rng.choice(("\n", "\n\n"))
    for _ in count():
        for speaker, line in zip(speakers, rng.choice(_TURNS), strict=True):
            yield f"{speaker}: {_tell(rng, line)}{end}"
        if rng.random() < 0.5:
            speakers.reverse()


def _prose(rng: Random) -> Iterator[str]:
    """Sentences in reading order, from anywhere on."""
    sentences = load_haystack(None)
    for i in count(rng.randrange(len(sentences))):
        yield sentences[i % len(sentences)] + ("\n\n" if rng.random() < 0.2 else " ")


_FACTS = (
    "The {item} belongs to {name}.",
    "The combination of the {item} is {number}.",
    "{name} keeps the {item} in {city}.",
    "Ticket {uuid} is about the {item}.",
    "Remember that {name} was born on {date}.",
    "The word of the day is {word}.",
    "Invoice {number} of {name} is due on {date}.",
    "The reference of the {item} reads {uuid}.",
)


def _prose_with_facts(rng: Random) -> Iterator[str]:
    """Prose in which now and then a sentence tells something that does not follow from it."""
    share = rng.uniform(0.02, 0.2)
    for sentence in _prose(rng):
        yield sentence
        if rng.random() < share:
            yield _tell(rng, rng.choice(_FACTS)) + " "


_PIECES: dict[str, Callable[[Random], Iterator[str]]] = {
    "words": _words,
    "repeated_words": _repeated_words,
    "numbers": _numbers,
    "csv": _csv,
    "markdown_table": _markdown_table,
    "json": _json,
    "keys": _keys,
    "code": _code,
    "logs": _logs,
    "dialogue": _dialogue,
    "prose": _prose,
    "prose_with_facts": _prose_with_facts,
}


def _mixed(rng: Random, tokens: int) -> str:
    """Two to five texts of other kinds under headings, as in a long prompt."""
    kinds = rng.sample(list(_PIECES), rng.randint(2, 5))
    cuts = [0.0, *sorted(rng.random() for _ in kinds[1:]), 1.0]
    sizes = (
        round(tokens * (after - before)) for before, after in zip(cuts, cuts[1:], strict=False)
    )
    texts = (TEXTS[kind](rng, max(16, size)) for kind, size in zip(kinds, sizes, strict=True))
    return "\n\n".join(f"## {_thing(rng).title()}\n\n{text}" for text in texts)


TEXTS: dict[str, TextKind] = {
    **{name: partial(_fill, pieces) for name, pieces in _PIECES.items()},
    "mixed": _mixed,
}
"""Kinds of texts by name."""
