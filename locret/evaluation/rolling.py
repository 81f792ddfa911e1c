"""The log-likelihood of a whole text that is read within a budget."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from locret.cache import RetainedCache
from locret.generation import Engine

SCALED = ("logits_scaling", "logit_scale", "final_logit_softcapping")
"""Settings of configs whose models do more than one matrix product to make logits."""


@torch.no_grad()
def rolling_log_likelihood(engine: Engine, ids: Tensor) -> tuple[float, RetainedCache]:
    """Sum of the log-probabilities of all tokens but the first.

    Every token is predicted from its chunk and what was kept of the chunks before, so that the
    memory is bounded however long the text is.

    Args:
        engine: reads the text.
        ids: [1, n] long.

    Returns:
        The sum, and the cache after the last token but one.

    Raises:
        ValueError: a model whose logits are more than its output layer's product.
    """
    model: Any = engine.model
    scaled = [name for name in SCALED if getattr(model.config, name, None)]
    if scaled:
        raise ValueError(
            f"rolling log-likelihoods within a budget are not there for models with {scaled[0]}"
        )
    total, seen = 0.0, 0

    def score(module: Any, args: Any, output: Any) -> None:
        nonlocal total, seen
        hidden = output[0]  # (1, T, hidden size)
        following = ids[0, seen + 1 : seen + 1 + hidden.shape[1]]
        seen += hidden.shape[1]
        logs = log_softmax(model.get_output_embeddings()(hidden[0]), dim=-1)
        total += float(logs.gather(1, following[:, None]).sum())

    hook = model.get_decoder().register_forward_hook(score)
    try:
        cache = engine.prefill(ids[:, :-1])
    finally:
        hook.remove()
    assert seen == ids.shape[1] - 1, "the engine read other tokens than the text's"
    return total, cache
