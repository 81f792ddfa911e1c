"""Head quotas: how many of the units that are kept each KV head keeps.

A *quota* is a head's share next to the mean: 1 in every head is the published form, equal budgets;
a head of quota 2 keeps twice as many units as heads do on average. Which heads need much is a
property of the model and hardly of the text, so quotas are tables [layers, KV heads], measured once
(`python -m locret calibrate`) for several *compressions* (tokens of the context for a unit kept).

Tables that users give are on any scale; `Quotas` brings each to mean 1. `unit_counts` makes whole
units of them, `measured` and `averaged` make them of scores.
"""

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locret.system.files import check_named

Table = tuple[tuple[float, ...], ...]
"""Numbers by layer and KV head."""

QuotasChoice = Any
"""How a user gives quotas (`quotas_of`): arrays of any library have no type in common."""

GRID_FROM = 512
"""Units from which on heads keep numbers that others share (`on_grid`)."""

FLOOR = Fraction(1, 20)
"""Of the mean: every head keeps that much, whatever its quota says."""

COMPRESSIONS = (2.0, 4.0, 8.0, 16.0, 32.0)
"""That tables are measured for."""

EXPECTED = (
    "numbers [layers, KV heads] of at least 0 and not all 0, such tables by compression "
    '({"2": [[...]], "8": [[...]]}), a .json or .npy file of either, or None for equal quotas'
)
"""The forms of quotas, for people."""

_NEARLY_WHOLE = 1e-6  # less than this from a whole number of units is rounding


@dataclass(frozen=True)
class Quotas:
    """Who keeps how much, by compression.

    Attributes:
        tables: compressions, ascending, each with its quotas of mean 1; a single one is for all.
    """

    tables: tuple[tuple[float, Table], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        _, table = self.tables[0]
        return len(table), len(table[0])

    def at(self, compression: float) -> Table:
        """Quotas of mean 1 for that many tokens a unit kept.

        Between two tables they are mixed in proportion to the logarithm of the compression; beyond
        the first and the last one, these hold.
        """
        known = [of for of, _ in self.tables]
        place = bisect_right(known, compression)
        if place in (0, len(known)):
            return self.tables[max(place - 1, 0)][1]
        (low, lower), (high, upper) = self.tables[place - 1 : place + 1]
        weight = math.log(compression / low) / math.log(high / low)
        return tuple(
            tuple((1 - weight) * a + weight * b for a, b in zip(*layers, strict=True))
            for layers in zip(lower, upper, strict=True)
        )

    def check_shape(self, num_layers: int, num_kv_heads: int) -> None:
        """Refuse these quotas (ValueError) for a model of another shape."""
        if self.shape != (num_layers, num_kv_heads):
            layers, heads = self.shape
            raise ValueError(
                f"quotas are for {layers} layers of {heads} KV heads; expected {num_layers} layers "
                f"(those without a sliding window) of {num_kv_heads}: calibrate them for this model"
            )


def quotas_of(given: Any) -> Quotas | None:
    """The quotas that a user means.

    Args:
        given: an array-like [layers, KV heads] on any scale, which holds for every compression; a
            mapping of such by compression; the path of a .json or .npy file; None = equal.

    Raises:
        ValueError: it has none of these forms.
    """
    if given is None or isinstance(given, Quotas):
        return given
    what = "quotas"
    if isinstance(given, str | Path):
        check_named(given, what)
        given, what = _read(Path(given), what), f"{what} of {given}"
    if not isinstance(given, Mapping):
        return Quotas(((1.0, _table_of(given, what)),))
    if not given:
        raise ValueError(f"{what} are an empty mapping; expected {EXPECTED}")
    tables = [(_compression_of(k, what), _table_of(v, f"{what} at {k}")) for k, v in given.items()]
    if len({compression for compression, _ in tables}) < len(tables):
        raise ValueError(f"{what} have compressions {list(given)}; expected each once")
    if len({(len(table), len(table[0])) for _, table in tables}) > 1:
        raise ValueError(f"{what} are tables of different shapes; expected one for all")
    return Quotas(tuple(sorted(tables)))


def _read(path: Path, what: str) -> Any:
    if path.suffix not in (".json", ".npy") or not path.is_file():
        raise ValueError(f"{what} is {str(path)!r}, which is not such a file; expected {EXPECTED}")
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        import numpy as np

        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{what}: {path} cannot be read: {error}; expected {EXPECTED}") from error


def _compression_of(given: Any, what: str) -> float:
    try:
        compression = float(given)
    except (TypeError, ValueError):
        compression = math.nan
    if not 1 <= compression < math.inf:
        raise ValueError(
            f"{what} have a table for compression {given!r}; expected a number of at least 1, the "
            'tokens for a unit kept, such as "8"'
        )
    return compression


def _table_of(given: Any, what: str) -> Table:
    """A table of mean 1."""
    rows = given.tolist() if hasattr(given, "tolist") else given
    if not _is_rectangle(rows):
        raise ValueError(f"{what} are {_shown(given)}; expected {EXPECTED}")
    numbers = [number for row in rows for number in row]
    mean = math.fsum(numbers) / len(numbers)
    if not (all(0 <= number < math.inf for number in numbers) and 0 < mean < math.inf):
        raise ValueError(
            f"{what} hold {min(numbers)} to {max(numbers)}; expected finite numbers of at least 0, "
            "not all of them 0"
        )
    return tuple(tuple(number / mean for number in row) for row in rows)


def _is_rectangle(rows: Any) -> bool:
    """Whether this is a list of equally long lists of numbers, none of them empty."""
    lists = list | tuple
    if not (isinstance(rows, lists) and rows and all(isinstance(row, lists) for row in rows)):
        return False
    numbers = [number for row in rows for number in row]
    whole = len({len(row) for row in rows}) == 1 and bool(numbers)
    return whole and all(isinstance(n, Real) and not isinstance(n, bool) for n in numbers)


def _shown(given: Any) -> str:
    shape = getattr(given, "shape", None)
    text = repr(given)
    short = text if len(text) < 60 else f"{text[:60]}..."
    return short if shape is None else f"an array of shape {list(shape)}"


# ---- whole units ---------------------------------------------------------------------------------


def unit_counts(
    shares: Sequence[Sequence[float]], budget: int | Sequence[int], most: int | Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Units that each head of each layer keeps, [layers][KV heads].

    A layer with budget b and H heads is worth H * b units, at most H * `most`; the sum over
    layers is what all heads keep together, exactly. It is dealt out in proportion to b times the
    head's share, so that a layer's own share of it is its budget times the mean of its quotas.
    Equal shares give every head its layer's budget, at most `most`.

    No head keeps more than `most` units, nor less than 1 or `FLOOR` of its layer's budget; what
    the one leaves and the other takes is made up by the other heads in proportion. What is left by
    rounding goes to the largest remainders, of equal ones to the first.

    Args:
        shares: [layers][KV heads], on any scale.
        budget: units a head keeps on average, in all layers or in each.
        most: units that a head can keep, in all layers or in each: tokens of the context.
    """
    highest = [max(units, 1) for units in _by_layer(most, len(shares))]
    budgets = [*map(min, _by_layer(budget, len(shares)), highest)]
    mean = math.fsum(map(math.fsum, shares)) / sum(map(len, shares))
    least_share = mean * float(FLOOR)  # shares of 0 too take their part of what others leave
    weights = [
        of_layer * max(share, least_share)
        for of_layer, layer in zip(budgets, shares, strict=True)
        for share in layer
    ]
    heads = len(shares[0])
    least = [math.ceil(of_layer * FLOOR) for of_layer in budgets for _ in range(heads)]
    bounds = [of_layer for of_layer in highest for _ in range(heads)]
    total = heads * sum(budgets)
    counts = _rounded(_filled(weights, least, bounds, total), least, bounds, total)
    return tuple(tuple(counts[i : i + heads]) for i in range(0, len(counts), heads))


def capped(budgets: Sequence[int], most: int | Sequence[int]) -> list[int]:
    """Budgets of layers, none above `most`, of all or of each: what is above goes to the others in
    proportion, as far as these have room."""
    bounds = [*_by_layer(most, len(budgets))]
    least = [*map(min, budgets, bounds)]
    if least == [*budgets]:
        return least
    total = min(sum(budgets), sum(bounds))
    weights = [float(max(budget, 1)) for budget in budgets]
    return _rounded(_filled(weights, least, bounds, total), least, bounds, total)


def within_slots(
    counts: tuple[tuple[int, ...], ...], slots: int, by_layer: bool
) -> tuple[tuple[int, ...], ...]:
    """Units [layers][KV heads] of which no head keeps more than `slots`, or than heads do on
    average where this is more: what is above goes to the others in proportion.

    Args:
        by_layer: on average in a layer, whose number the user chose; else in all.
    """
    heads, every = len(counts[0]), [units for layer in counts for units in layer]
    averages = [sum(of) // len(of) for of in (counts if by_layer else [every] * len(counts))]
    most = [max(slots, average) for average in averages]
    found = capped(every, [units for units in most for _ in range(heads)])
    if found == every:
        return counts
    layers = tuple(tuple(found[i : i + heads]) for i in range(0, len(found), heads))
    return on_grid(layers, most)


def _by_layer(numbers: int | Sequence[int], layers: int) -> Sequence[int]:
    return [numbers] * layers if isinstance(numbers, int) else numbers


def on_grid(
    counts: tuple[tuple[int, ...], ...], most: int | Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Nearly the same counts, of numbers that many heads share: those from `GRID_FROM` on have five
    significant bits, or are `most`. Fused attention makes a plan for every number of units that it
    meets, which takes milliseconds; so they are made once.

    Args:
        counts: units of each head, [layers][KV heads].
        most: units that a head can keep, in all layers or in each.

    Returns:
        Together no more than given, and less by no more than a step of one head.
    """
    exact = [n for heads in counts for n in heads]
    steps = [1 << max(n.bit_length() - 5, 0) if n >= GRID_FROM else 1 for n in exact]
    found = [n // step * step for n, step in zip(exact, steps, strict=True)]
    heads = len(counts[0])
    bounds = [units for units in _by_layer(most, len(counts)) for _ in range(heads)]
    left = sum(exact) - sum(found)
    for i in sorted(range(len(exact)), key=lambda i: ((found[i] - exact[i]) / steps[i], i)):
        up = min(found[i] + steps[i], bounds[i])
        if found[i] < exact[i] and up - found[i] <= left:
            left -= up - found[i]
            found[i] = up
    return tuple(tuple(found[i : i + heads]) for i in range(0, len(found), heads))


def is_on_grid(count: int) -> bool:
    """Whether a number of units has five significant bits."""
    return count < 32 * (count & -count)


def _filled(weights: list[float], least: list[int], most: list[int], total: int) -> list[float]:
    """Amounts in proportion to the weights, but for those at their least or most, that sum up to
    `total`."""

    def amounts(scale: float) -> list[float]:
        bounded = zip(weights, least, most, strict=True)
        return [min(max(scale * weight, low), high) for weight, low, high in bounded]

    def summed(scale: float) -> Any:
        return math.fsum(amounts(scale))

    # Between two scales at which an amount meets its bound, the sum is a straight line.
    bends = {low / weight for weight, low in zip(weights, least, strict=True)}
    scales = sorted(bends | {high / weight for weight, high in zip(weights, most, strict=True)})
    place = bisect_left(scales, total, key=summed)
    if place in (0, len(scales)):
        return amounts(scales[max(place - 1, 0)])
    low, high = scales[place - 1 : place + 1]
    part = (total - summed(low)) / (summed(high) - summed(low))
    return amounts(low + part * (high - low))


def _rounded(exact: list[float], least: list[int], most: list[int], total: int) -> list[int]:
    """Whole numbers within the bounds, beside the exact ones, that sum up to `total`."""
    near = [round(x) if abs(x - round(x)) < _NEARLY_WHOLE else x for x in exact]
    counts = [int(x) for x in near]
    by_remainder = sorted(range(len(near)), key=lambda i: (counts[i] - near[i], i))
    left = total - sum(counts)
    while left > 0:
        for i in [i for i in by_remainder if counts[i] < most[i]][:left]:
            counts[i] += 1
            left -= 1
    while left < 0:  # float arithmetic put a sum of near whole numbers too high
        for i in [i for i in reversed(by_remainder) if counts[i] > least[i]][:-left]:
            counts[i] -= 1
            left += 1
    return counts


# ---- from scores ---------------------------------------------------------------------------------


def measured(scores: Sequence[Tensor], compressions: Sequence[float]) -> list[Tensor]:
    """What heads keep of one context where the best units of the whole model stay.

    Args:
        scores: [H, T] of each layer, on one scale; higher = keep.
        compressions: 1 / r of all units stays.

    Returns:
        For each compression the fraction of every head's units that stays, [layers, H] float64.
    """
    together = torch.stack([layer.float().cpu() for layer in scores])
    layers, heads, units = together.shape
    best_first = together.flatten().argsort(descending=True, stable=True)
    of_head = best_first.div(units, rounding_mode="floor")
    fractions = []
    for compression in compressions:
        kept = of_head[: max(1, round(together.numel() / compression))]
        counts = kept.bincount(minlength=layers * heads).view(layers, heads)
        fractions.append(counts.double() / units)
    return fractions


def checked_sharpness(given: float) -> float:
    """The same number. ValueError: it is no power for shares (`averaged`)."""
    if not 0 < given < math.inf:
        raise ValueError(f"quota_sharpness is {given}; expected a number above 0")
    return given


def averaged(fractions: Sequence[Tensor], sharpness: float = 1.0) -> list[list[float]]:
    """Quotas of mean 1, at least about `FLOOR`, from what heads kept of each context.

    Args:
        fractions: [layers, H] each; every context counts alike.
        sharpness: shares are raised to this power: above 1, heads become more unequal than they
            were measured.
    """
    shares = torch.stack(list(fractions)).mean(dim=0)
    shares = (shares / shares.max()) ** sharpness  # the largest stays 1 whatever the power
    raised = (shares / shares.mean()).clamp(min=float(FLOOR))
    return [[round(quota, 4) for quota in layer] for layer in (raised / raised.mean()).tolist()]


# ---- for people ----------------------------------------------------------------------------------

TENTH = 10


def spread(table: Sequence[Sequence[float]]) -> dict[str, float]:
    """How unequal heads are.

    Returns:
        `largest` and `smallest` quota next to the mean; `top_tenth`, what the tenth of the heads
        with the largest quotas (at least one) keeps of all.
    """
    quotas = sorted((quota for layer in table for quota in layer), reverse=True)
    mean = math.fsum(quotas) / len(quotas)
    first = math.fsum(quotas[: max(1, len(quotas) // TENTH)])
    return {
        "largest": quotas[0] / mean,
        "smallest": quotas[-1] / mean,
        "top_tenth": first / math.fsum(quotas),
    }


def in_words(table: Sequence[Sequence[float]]) -> str:
    """How unequal heads are, in one line."""
    told = spread(table)
    return (
        f"from {told['smallest']:.2f} to {told['largest']:.2f} of the mean; "
        f"the tenth of the heads that keeps most has {told['top_tenth']:.0%}"
    )
