"""When an answer ends: at the end of the turn, before a stop string, or after so many tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

LOOK_BACK = 16  # tokens whose text can hold the end of a stop string


class StopStrings(StoppingCriteria):
    """Ends a row once one of the strings stands in what was generated.

    White space before the answer's first word ends nothing: models begin with line breaks.

    Args:
        strings: to stop at.
        tokenizer: decodes what was generated.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        self._start: int | None = None  # of the answer: the first call comes after its first token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._start is None:
            self._start = input_ids.shape[1] - 1
        answers = input_ids[:, self._start :]
        first = max(0, answers.shape[1] - LOOK_BACK)
        ended = [
            any(string in text for string in self.strings)
            for text in map(self._text, answers, [first] * len(answers))
        ]
        return torch.tensor(ended, device=input_ids.device)

    def _text(self, answer: Tensor, first: int) -> str:
        tail = self.tokenizer.decode(answer[first:], skip_special_tokens=True)
        return tail if first else tail.lstrip()


def before_stop(text: str, strings: Sequence[str]) -> tuple[str, bool]:
    """The answer before the first stop string, and whether one was there."""
    text = text.lstrip()
    places = [place for place in map(text.find, strings) if place >= 0]
    return text[: min(places, default=len(text))].rstrip(), bool(places)
