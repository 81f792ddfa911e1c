"""Several sequences as one, without copying any."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


class Joined(Sequence[T]):
    """The items of the parts, one part after the other.

    Attributes:
        parts: the sequences; the empty ones do no harm.
    """

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> T:  # type: ignore[override]
        part, offset = self.locate(i)
        return self.parts[part][offset]

    def locate(self, i: int) -> tuple[int, int]:
        """Number of the part that holds item i, and the offset there; i may count from the end.

        Raises:
            IndexError: if there is no such item.
        """
        i = range(len(self))[i]
        part = bisect_right(self._ends, i)
        return part, i - self._ends[part] + len(self.parts[part])

    def start(self, part: int) -> int:
        """Index of a part's first item."""
        return self._ends[part] - len(self.parts[part])
