"""The stop strings of lm-evaluation-harness, where the answer begins wherever it begins."""

from collections.abc import Sequence
from typing import Any

from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from transformers import StoppingCriteria


class HarnessStops(StoppingCriteria):
    """Ends a batch once every row has one of the strings, as the harness's `hf` model does."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self._strings = list(strings)
        self._tokenizer = tokenizer
        self._criteria: Any = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if self._criteria is None:  # the first call comes after the answer's first token
            rows, length = input_ids.shape
            self._criteria = stop_sequences_criteria(
                self._tokenizer, self._strings, length - 1, rows
            )
        return self._criteria(input_ids, scores, **kwargs)
