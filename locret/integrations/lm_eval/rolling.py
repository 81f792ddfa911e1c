"""The log-likelihood of a whole text that is read within a budget."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from locret.cache.cache import RetainedCache
from locret.engine.engine import Engine
from locret.model.hooks import as_argument


@torch.no_grad()
def rolling_log_likelihood(engine: Engine, ids: Tensor) -> tuple[float, RetainedCache]:
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
    cache, budgets = engine.new_cache(length)
    assert budgets is not None, "without a budget the text is scored as it stands"
    cache.prompt_lengths = (length,)
    total, size = 0.0, engine.config.reading.chunk_size or length
    with engine, engine.reading_into(cache, budgets):
        for start in range(0, length - 1, size):
            chunk = ids[:, start : min(start + size, length - 1)]
            following = ids[0, start + 1 : start + 1 + chunk.shape[1]]
            logits = model(input_ids=chunk, use_cache=True, **as_argument(model, cache)).logits[0]
            logs = log_softmax(logits.float(), dim=-1)
            total += float(logs.gather(1, following[:, None]).sum())
    return total, cache
