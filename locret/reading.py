"""How contexts are read: in which chunks, what is kept of them, and which rows go together.

Rows of different lengths are not padded to be read: chunks that begin and end alike are read
together, and each row's last ones by themselves.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

TOGETHER = 8192
"""Tokens of different rows that are read at a time: more does not make a device faster."""


class Reading(NamedTuple):
    """How a context is read.

    Attributes:
        ids: [B, n] long, a question in front of or behind the context included.
        prompt_length: tokens of the whole prompt.
        budgets: units that every layer keeps of it; None = all.
        query_length: tokens of the question in front.
        drop: tokens of the question behind, which are not kept.
        chunks: start and end of every chunk.
    """

    ids: Tensor
    prompt_length: int
    budgets: tuple[int, ...] | None
    query_length: int
    drop: int
    chunks: tuple[tuple[int, int], ...]


def together(readings: Sequence[Reading], most: int) -> list[list[int]]:
    """Which readings may begin together, `most` at a time: they keep alike, of alike questions."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, reading in enumerate(readings):
        alike = reading.budgets, reading.query_length, reading.drop
        groups.setdefault(alike, []).append(i)
    return [group[at : at + most] for group in groups.values() for at in range(0, len(group), most)]


def alike_at(readings: Sequence[Reading], rows: Sequence[int], at: int) -> list[list[int]]:
    """Those of `rows` whose chunks number `at` are alike: both final or not, or there is none."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i in rows:
        chunks = readings[i].chunks
        alike = chunks[at : at + 1], at + 1 == len(chunks)
        groups.setdefault(alike, []).append(i)
    return list(groups.values())
