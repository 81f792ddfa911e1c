"""How the harness's prompts and texts are read: where a context ends and where an answer stops, and
the log-likelihood of a whole text within a budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import StoppingCriteria

from locret.cache.cache import RetainedCache
from locret.engine.engine import Engine
from locret.model.hooks import as_argument


@dataclass(frozen=True)
class ContextFinder:
    """Finds the end of the context in prompts.

    Attributes:
        field: of the document; where its text ends in the prompt, the context ends.
        marker: where this text stands last in the prompt, the question begins; for documents
            without the field.
    """

    field: str
    marker: str | None = None

    def end(self, prompt: str, document: Mapping[str, Any]) -> int | None:
        """The character at which the context ends; None if neither the field's text nor the marker
        stands in the prompt."""
        text = document.get(self.field)
        if isinstance(text, str) and text.strip():
            start = prompt.rfind(text.strip())
            if start >= 0:
                return start + len(text.strip())
        start = prompt.rfind(self.marker) if self.marker else -1
        return None if start < 0 else start

    def refuse(self, document: Mapping[str, Any], task: str) -> NoReturn:
        """Say that the context of a task's documents cannot be told from the question."""
        raise ValueError(
            f"task {task}: the context cannot be told from the question, because its documents "
            f"have no {self.field!r} whose text stands in the prompt (they have "
            f"{', '.join(sorted(document))}); give context_field, or question_marker: the text "
            "with which questions begin; or protocol=query_aware"
        )


def tokens_after(tokenizer: Any, text: str, character: int) -> int:
    """Tokens of `text` that end after a character of it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return sum(end > character for _, end in encoded["offset_mapping"])


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


@torch.no_grad()
def text_log_likelihood(engine: Engine, ids: Tensor) -> tuple[float, RetainedCache]:
    """Sum of the log-probabilities of all tokens but the first.

    Every token is predicted from its chunk and what was kept of the chunks before, so that the
    memory is bounded however long the text is.

    Args:
        engine: with a budget; says how the text is read.
        ids: [1, n] long.

    Returns:
        The sum, and the cache after the last token but one.
    """
    model: Any = engine.model
    length = ids.shape[1]
    cache, counts = engine.new_cache(length)
    assert counts is not None, "without a budget the text is scored as it stands"
    cache.prompt_lengths = (length,)
    total, size = 0.0, engine.config.reading.chunk or length
    with engine, engine.reading_into(cache, counts):
        for start in range(0, length - 1, size):
            chunk = ids[:, start : min(start + size, length - 1)]
            following = ids[0, start + 1 : start + 1 + chunk.shape[1]]
            logits = model(input_ids=chunk, use_cache=True, **as_argument(model, cache)).logits[0]
            logs = log_softmax(logits.float(), dim=-1)
            total += float(logs.gather(1, following[:, None]).sum())
    return total, cache
