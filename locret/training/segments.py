"""Where the samples of a packed sequence lie, and which of their tokens are answers.

Several conversations stand in one row, one after the other; each attends to itself only. An answer
labels every token of its own segment that stands before it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
    branches: tuple[tuple[int, int], ...] = ()

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


def check_segments(segments: Sequence[Segment], length: int) -> None:
    """Refuse segments that a row of `length` tokens cannot hold.

    Raises:
        ValueError: segments that do not fill the row one after the other, or a segment whose
            answers are none, empty, out of order, overlapping, outside of it or at its very start.
    """
    ends = [0, *(segment.end for segment in segments)]
    if ends[:-1] != [segment.start for segment in segments] or ends[-1] != length:
        raise ValueError(f"segments {list(segments)} do not fill the row of {length} tokens")
    for segment in segments:
        borders = [edge for answer in segment.answers for edge in answer]
        empty = [answer for answer in segment.answers if answer[0] >= answer[1]]
        inside = borders and segment.start < borders[0] and borders[-1] <= segment.end
        if empty or not inside or borders != sorted(borders):
            raise ValueError(
                f"segment {segment.start} .. {segment.end} has the answers {segment.answers}; "
                "expected at least one (start, end), none empty, in order, without overlap, inside "
                "the segment and after its first token"
            )


def with_query_in_front(
    input_ids: Tensor, segments: Sequence[Segment], query_tokens: int
) -> tuple[Tensor, list[Segment]]:
    """Repeat the end of each segment's last prompt, the question, at its start (Locret-Q).

    Args:
        input_ids: [1, N] long, a packed row.
        segments: what stands in it.
        query_tokens: how many tokens to repeat at most.

    Returns:
        The longer row and its segments.
    """
    rows, longer, at = [], [], 0
    for segment in segments:
        ask = max(segment.start, segment.last_prompt_end - query_tokens)
        query = input_ids[:, ask : segment.last_prompt_end]
        shift = at + query.shape[1] - segment.start
        rows += [query, input_ids[:, segment.start : segment.end]]
        answers = tuple((start + shift, end + shift) for start, end in segment.answers)
        longer.append(Segment(at, segment.end + shift, answers))
        at = segment.end + shift
    return torch.cat(rows, dim=1), longer
