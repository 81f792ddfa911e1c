"""Amounts as people write them: 24GiB of memory, 128K tokens, a budget of 8x."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

KIBI = 1024
BYTES = {
    "": 1,
    "B": 1,
    **{f"{unit}iB": KIBI**power for power, unit in enumerate("KMGT", start=1)},
    **{f"{unit}B": 1000**power for power, unit in enumerate("KMGT", start=1)},
}
"""Bytes by unit."""

TOKENS = {"": 1, "K": KIBI, "M": KIBI**2}
"""Tokens by unit; lengths of contexts are counted in powers of two."""

OF_BYTES = " bytes"
"""Behind a share: its bytes are meant."""

MOST = 2**60
"""No amount is larger: more is a slip of the hand, and sums of it would not be exact."""

BUDGETS = (
    "units (6000), a share of the context (0.25 or 8x), the bytes of a share in 16 bits (8x "
    "bytes), memory (2GiB), one number for each layer, or None for no limit"
)
"""The forms of a budget, for people who write Python or YAML."""

BUDGET_TEXTS = (
    "units (6000), a share of the prompt (0.25 or 8x), the bytes of a share in 16 bits (8x bytes), "
    "memory (512MiB), none for no limit, or auto"
)
"""The forms of a budget on a command line."""


@dataclass(frozen=True)
class Memory:
    """A budget in bytes, of the units of all layers."""

    nbytes: int

    def __str__(self) -> str:
        """The bytes, in a form that `budget_of` takes."""
        return f"{self.nbytes}B"


@dataclass(frozen=True)
class ByteShare:
    """A budget in bytes: at most that share of what keys and values of the context take in 16 bits,
    however the cache is stored; its scores and source positions are counted in.

    Attributes:
        share: between 0 and 1.
    """

    share: float

    def __str__(self) -> str:
        return f"{round(1 / self.share)}x bytes"


Budget = int | float | tuple[int, ...] | Memory | ByteShare | None
"""Units a KV head keeps on average: a number; a share of the context, below 1; one number for each
layer; what fits into a memory, or into the bytes of a share; None = all."""

BudgetChoice = int | float | str | Sequence[int] | Memory | ByteShare | None
"""How a user gives a budget (`budget_of`)."""


def is_whole(value: object, least: int) -> bool:
    """Whether this is a whole number, and at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_whole(what: str, value: object, least: int, instead: str = "") -> None:
    """Raises ValueError: `value`, which is called `what`, is no whole number of at least `least`.
    `instead` is what else is taken, and why, as the error shall say it."""
    if not is_whole(value, least):
        expected = f"expected a whole number of at least {least}{instead}"
        if isinstance(value, str) and value.strip().isdecimal():
            expected += f"; give a number, {value.strip()}, not a text"
        raise ValueError(f"{what} is {value!r}; {expected}")


def check_bounds(what: str, bounds: Sequence[Any], least: float) -> None:
    """Raises ValueError: `bounds`, which are called `what`, are not two finite numbers of at least
    `least`, the smaller one first."""
    numbers = [x for x in bounds if isinstance(x, int | float) and least <= x < math.inf]
    if len(bounds) != 2 or len(numbers) != 2 or bounds[0] > bounds[1]:
        expected = f"expected two numbers of at least {least}, the smaller one first"
        if len(bounds) == len(numbers) == 2:
            expected += f": {sorted(bounds)}"
        raise ValueError(f"{what} is {list(bounds)}; {expected}")


def check_between(what: str, value: object, least: float, most: float = math.inf) -> None:
    """Raises ValueError: `value`, which is called `what`, is no finite number of `least` to
    `most`."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and least <= value <= most):  # type: ignore[operator]
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{what} is {value!r}; expected a number {bounds}")


def parse_bytes(text: str) -> int:
    """`24GiB`, `24 GB` or a plain number -> bytes. Raises ValueError: not an amount of memory."""
    return _parse(text, BYTES, "an amount of memory such as 24GiB, 24GB or a number of bytes")


def parse_tokens(text: str) -> int:
    """`128K` (131,072), `1M` or a plain number -> tokens. Raises ValueError: not a number of
    tokens."""
    return _parse(text, TOKENS, "a number of tokens such as 4096, 128K (131072) or 1M")


def budget_of(given: Any, what: str = "budget") -> Budget:
    """The budget that a user means.

    Args:
        given: units; a share of the context, as 0.125 or "8x", an eighth; "8x bytes", the bytes of
            such a share in 16 bits; memory, as "2GiB"; one number for each layer; None = no limit.
        what: what errors call it.

    Raises:
        ValueError: it has none of these forms.
    """
    if given is None or isinstance(given, Memory | ByteShare):
        return given
    if isinstance(given, str):
        return _budget_in_words(given, what)
    if isinstance(given, Sequence):
        return _budget_of_layers(given, what)
    if isinstance(given, bool) or not isinstance(given, Real):
        raise ValueError(f"{what} is {given!r}; expected {BUDGETS}")
    if isinstance(given, Integral):
        if not is_whole(given, 1):
            raise ValueError(f"{what} is {given}; expected at least 1, or None for no limit")
        return int(given)
    share = float(given)
    if not 0 < share < 1:
        raise ValueError(
            f"{what} is {given}; expected a share of the context, between 0 and 1, or a whole "
            "number of units"
        )
    return share


def parse_budget(text: str) -> Any:
    """A budget as it is written on a command line: what `budget_of` makes of it, or "auto". Raises
    ValueError: it has none of the forms."""
    words: dict[str, Any] = {"auto": "auto", "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if re.fullmatch(r"0?\.\d+", text) and 0 < float(text) < 1:
        return float(text)
    if _is_factor(text.removesuffix(OF_BYTES)) or _is_memory(text):
        return budget_of(text)
    raise ValueError(f"{text!r} is not a budget; expected {BUDGET_TEXTS}")


def _budget_in_words(given: str, what: str) -> float | Memory | ByteShare:
    factor = given.removesuffix(OF_BYTES)
    if _is_factor(factor):
        share = 1 / int(factor[:-1])
        return share if factor == given else ByteShare(share)
    if _is_memory(given):
        return Memory(parse_bytes(given))
    raise ValueError(f"{what} is {given!r}; expected a number of {BUDGETS}")


def _budget_of_layers(given: Sequence[Any], what: str) -> tuple[int, ...]:
    if not given or not all(is_whole(units, 1) for units in given):
        raise ValueError(
            f"{what} is {list(given)}; expected one whole number of at least 1 for each layer"
        )
    return tuple(int(units) for units in given)


def _is_factor(text: str) -> bool:
    """Whether this says how many tokens there are for every unit: 8x."""
    found = re.fullmatch(r"([0-9]{1,18})x", text)
    return found is not None and int(found[1]) > 1


def _is_memory(text: str) -> bool:
    """Whether this is an amount with a unit of memory; a plain number counts units."""
    return re.fullmatch(r"[\d.]+ *[kmgt]?i?b", text, re.IGNORECASE) is not None


def format_bytes(size: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1: `6.4 GiB`."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < BYTES[larger]:
            break
        unit = larger
    return f"{size / BYTES[unit]:,.0f} B" if unit == "B" else f"{size / BYTES[unit]:,.1f} {unit}"


def _parse(text: str, units: dict[str, int], expected: str) -> int:
    by_name = {name.lower(): factor for name, factor in units.items()}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].lower() not in by_name:
        raise ValueError(f"{text!r} is not {expected}")
    unit = by_name[found[2].lower()]
    amount = float(found[1]) * unit
    if amount < 1:
        raise ValueError(f"{text!r} is less than 1; expected {expected}")
    if amount > MOST:
        raise ValueError(f"{text!r} is more than there is anywhere; expected {expected}")
    if unit == 1 and amount % 1:
        raise ValueError(f"{text!r} is not a whole number; expected {expected}")
    return int(amount)
