"""Where the samples of a packed sequence lie, and which of their tokens are answers.

Several conversations stand in one row, one after the other; each attends to itself only. An answer
labels every token of its own segment that stands before it.
"""

from typing import NamedTuple


class Segment(NamedTuple):
    """One conversation in a packed row. Offsets are of the row; ends are exclusive.

    Attributes:
        start, end: the conversation's tokens.
        answers: (start, end) of each answer, in order, without overlap; at least one token stands
            before the first.
    """

    start: int
    end: int
    answers: tuple[tuple[int, int], ...]

    @classmethod
    def single(cls, prompt_length: int, length: int) -> "Segment":
        """A row of one prompt and one answer.

        Raises:
            ValueError: no prompt or no answer.
        """
        if not 0 < prompt_length < length:
            raise ValueError(
                f"prompt_length is {prompt_length} of {length} tokens; both a prompt and an answer "
                "are needed"
            )
        return cls(0, length, ((prompt_length, length),))

    @property
    def last_prompt_end(self) -> int:
        """Offset of the last answer's start: tokens before it are labelled at least once."""
        return self.answers[-1][0]
