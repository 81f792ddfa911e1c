"""Amounts as people write them: 24GiB of memory, 128K tokens."""

import math
import re
from numbers import Integral, Real

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

MOST = 2**60
"""No amount is larger: more is a slip of the hand, and sums of it would not be exact."""


def is_whole(value: object, least: int) -> bool:
    """Whether this is a whole number, and at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_whole(what: str, value: object, least: int) -> None:
    """
    Raises:
        ValueError: `value`, which is called `what`, is no whole number, or below `least`.
    """
    if not is_whole(value, least):
        raise ValueError(f"{what} is {value!r}; expected a whole number of at least {least}")


def check_between(what: str, value: object, least: float, most: float = math.inf) -> None:
    """
    Raises:
        ValueError: `value`, which is called `what`, is no finite number of `least` to `most`.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and least <= value <= most):  # type: ignore[operator]
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{what} is {value!r}; expected a number {bounds}")


def parse_bytes(text: str) -> int:
    """`24GiB`, `24 GB` or a plain number -> bytes.

    Raises:
        ValueError: not an amount of memory.
    """
    return _parse(text, BYTES, "an amount of memory such as 24GiB, 24GB or a number of bytes")


def parse_tokens(text: str) -> int:
    """`128K` (131,072), `1M` or a plain number -> tokens.

    Raises:
        ValueError: not a number of tokens.
    """
    return _parse(text, TOKENS, "a number of tokens such as 4096, 128K (131072) or 1M")


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
