"""Which tokens of an over-long prompt go.

One stretch goes: the middle, the left or the right. Where it would begin or end inside an earlier
answer of the conversation it grows until that answer is gone as a whole, for half an answer would
teach what nobody said; the prompt is then shorter than the bound by up to that answer's length.
"""

from typing import Literal

Cut = Literal["middle", "left", "right"]
Span = tuple[int, int]  # start and exclusive end


def cut_window(length: int, limit: int, cut: Cut, answers: tuple[Span, ...] = ()) -> Span:
    """The stretch of a prompt that goes, so that at most `limit` tokens are left.

    Args:
        length: tokens of the prompt.
        limit: the most to keep, at least 1.
        cut: the part that goes. Without its middle an odd limit keeps one token more at the start
            than at the end.
        answers: earlier answers within the prompt, none of them at its very start.

    Returns:
        Start and exclusive end; both are `length` when nothing has to go.
    """
    if length <= limit:
        return length, length
    start = {"middle": (limit + 1) // 2, "left": 0, "right": limit}[cut]
    end = start + length - limit
    for first, last in answers:
        start = first if first < start < last else start
        end = last if first < end < last else end
    return start, end


def cut_spans(spans: tuple[Span, ...], window: Span) -> tuple[Span, ...]:
    """Where the spans lie once the window is gone; without those that went with it.

    A span that the cut left with no token before it is dropped too: there is nothing to label.
    """
    start, end = window
    gone = end - start
    kept = ((a, b) for a, b in spans if b <= start or a >= end)
    moved = ((a - gone, b - gone) if a >= end else (a, b) for a, b in kept)
    return tuple((a, b) for a, b in moved if a > 0)
