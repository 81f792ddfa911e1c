"""Where the samples of a packed sequence lie, and which of their tokens are answers.

Several conversations stand in one row, one after the other; each attends to itself only. An answer
labels every token of its own segment that stands before it.

A segment may be a trunk with branches: the trunk is what the cache will hold, each branch a way to
go on from it, such as a question and its answer, or the trunk said again. In the row the branches
follow the trunk one after the other; each sees the trunk and itself, at the slots right after the
trunk. The answers of all branches label the trunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int]
"""Offsets in a row: of the first token, and of the one after the last."""


class Stretch(NamedTuple):
    """Tokens of a segment that follow one another: all of it, its trunk, or one of its branches.

    Attributes:
        start, end: the tokens.
        trunk: the tokens that they see before themselves; empty unless this is a branch.
        answers: those among the tokens.
        reach: slots that the whole segment takes, which is what LongRoPE's `by_length` rule reads.
    """

    start: int
    end: int
    trunk: Span
    answers: tuple[Span, ...]
    reach: int

    def slots(self, start: int, end: int) -> tuple[int, int, int]:
        """Where the tokens start .. end - 1 stand, as `Rotary.rotate_ranges` takes it."""
        first = self.trunk[1] - self.trunk[0] - self.start
        return first + start, first + end, self.reach

    def pieces(self, x: Tensor, end: int) -> tuple[Tensor, ...]:
        """Of a row's `x` [B, H, row, D], what the token before `end` sees, one after the other."""
        own = x[:, :, self.start : end]
        first, last = self.trunk
        return (own,) if first == last else (x[:, :, first:last], own)

    def seen(self, x: Tensor, end: int) -> Tensor:
        """The same in one."""
        pieces = self.pieces(x, end)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


class Segment(NamedTuple):
    """One conversation in a packed row. Offsets are of the row; ends are exclusive.

    Attributes:
        start, end: the conversation's tokens.
        answers: (start, end) of each answer, in order, without overlap; at least one token stands
            before the first.
        branches: (start, end) of each branch; none if the segment is one text. They fill the end of
            the segment without gaps, after at least one token of trunk. Each holds one answer,
            which ends where the branch ends.
    """

    start: int
    end: int
    answers: tuple[Span, ...]
    branches: tuple[Span, ...] = ()

    @classmethod
    def single(cls, prompt_length: int, length: int) -> "Segment":
        """A row of one prompt and one answer. ValueError: no prompt or no answer."""
        if not 0 < prompt_length < length:
            raise ValueError(
                f"prompt_length is {prompt_length} of {length} tokens; both a prompt and an answer "
                "are needed"
            )
        return cls(0, length, ((prompt_length, length),))

    @property
    def last_prompt_end(self) -> int:
        """Where labelled tokens end: at the last answer's start or, with branches, at the trunk's
        end."""
        return self.branches[0][0] if self.branches else self.answers[-1][0]

    @property
    def before_answers(self) -> list[int]:
        """For each token of each answer, in order, the token that predicts it: the one before it,
        which of a branch's first token is the trunk's last."""
        found = []
        for stretch in self.stretches:
            for start, end in stretch.answers:
                first = stretch.trunk[1] if start == stretch.start else start
                found += [first - 1, *range(start, end - 1)]
        return found

    @property
    def stretches(self) -> list[Stretch]:
        """All of the segment's tokens, in order."""
        nothing = self.start, self.start
        if not self.branches:
            length = self.end - self.start
            return [Stretch(self.start, self.end, nothing, self.answers, length)]
        trunk = self.start, self.branches[0][0]
        reach = trunk[1] - trunk[0] + max(end - start for start, end in self.branches)
        of_branches = [
            Stretch(*branch, trunk, (answer,), reach)
            for branch, answer in zip(self.branches, self.answers, strict=True)
        ]
        return [Stretch(*trunk, nothing, (), reach), *of_branches]


def slots_of(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """Slots of a row's tokens, as `Rotary.rotate_ranges` takes them."""
    stretches = [stretch for segment in segments for stretch in segment.stretches]
    return [stretch.slots(stretch.start, stretch.end) for stretch in stretches]


class Way(NamedTuple):
    """A branch in the row of branches.

    Attributes:
        segment: its trunk's, counted in the row.
        stretch: the branch in the row that it comes from.
        shift: from an offset in that row to one in the row of branches.
    """

    segment: int
    stretch: Stretch
    shift: int

    @property
    def asking(self) -> range:
        """Tokens of the row that it comes from which predict one of its answer, the branch's own
        alone: the trunk's last token predicts the same in both rows."""
        ((start, end),) = self.stretch.answers
        return range(max(start - 1, self.stretch.start), end - 1)


def ways_of(segments: Sequence[Segment]) -> list[Way]:
    """All branches of a row, one after the other."""
    ways, at = [], 0
    for number, segment in enumerate(segments):
        for stretch in segment.stretches[1:]:
            ways.append(Way(number, stretch, at - stretch.start))
            at += stretch.end - stretch.start
    return ways


def check_segments(segments: Sequence[Segment], length: int) -> None:
    """Refuse segments that a row of `length` tokens cannot hold. ValueError: segments that do not
    fill the row one after the other, or a segment whose answers are none, empty, out of order,
    overlapping, outside of it or at its very start, or whose branches leave gaps, no trunk, or do
    not end with an answer each."""
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
        if segment.branches:
            _check_branches(segment)


def _check_branches(segment: Segment) -> None:
    starts, ends = zip(*segment.branches, strict=True)
    trunk = segment.start < starts[0]
    filled = starts[1:] == ends[:-1] and ends[-1] == segment.end
    answered = ends == tuple(end for _, end in segment.answers) and all(
        branch[0] <= answer[0]
        for branch, answer in zip(segment.branches, segment.answers, strict=True)
    )
    if not (trunk and filled and answered):
        raise ValueError(
            f"segment {segment.start} .. {segment.end} has the branches {segment.branches} and the "
            f"answers {segment.answers}; expected branches without gaps up to the segment's end, "
            "after at least one token of trunk, each with one answer that ends where it ends"
        )


def with_query_in_front(
    input_ids: Tensor, segments: Sequence[Segment], query_tokens: int
) -> tuple[Tensor, list[Segment]]:
    """Repeat the end of each segment's last prompt in a row [1, N], its question of at most
    `query_tokens`, at the segment's start (Locret-Q): the longer row and its segments.

    Raises:
        ValueError: a segment has branches: a trunk has no question.
    """
    branched = [segment for segment in segments if segment.branches]
    if branched:
        raise ValueError(
            f"query_tokens is {query_tokens} and {len(branched)} of {len(segments)} samples have "
            "branches; set query_tokens to 0, or make samples without branches"
        )
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
