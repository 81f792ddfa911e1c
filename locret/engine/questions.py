"""Contexts of one row each that are asked together, with questions of any lengths.

B rows of a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.engine.passes import freeze
from locret.engine.reading import Reader


def together(
    reader: Reader, rows: Sequence[RetainedCache], questions: Sequence[Tensor]
) -> RetainedCache:
    """Caches of one row each as one batch, after tokens [1, n] more of each, or none: those
    that read equally many read at once. Empties `rows`.

    Raises:
        ValueError: some caches have no question and others do, or some have tokens to read that
            may evict units (`decode_interval`).
    """
    if len(questions) not in (0, len(rows)):
        raise ValueError(
            f"{len(questions)} questions for {len(rows)} caches; expected one for each, or none"
        )
    if len({layer.rotated for row in rows for layer in row.retained_layers}) > 1:
        for row in rows:
            _freeze(reader, row)
    tokens, left = [row.unread_ids for row in rows], None
    if questions:
        given = [question.cpu() for question in questions]
        tokens = [torch.cat(x, dim=1) for x in zip(tokens, given, strict=True)]
    elif len({each.shape[1] for each in tokens}) == 1:  # it is read with the next question
        left, tokens = torch.cat(tokens), [each[:, :0] for each in tokens]
    lengths, read = [each.shape[1] for each in tokens], [*rows]
    if any(lengths) and reader.config.reading.decode_interval and rows[0].budget is not None:
        raise ValueError(
            "decode_interval: contexts cannot read questions together, nor can those that were "
            "asked before stand beside fresh ones; ask one at a time"
        )
    device = reader.backbone.layers[0].device  # that of the model is "meta" where weights wait
    for length in sorted(set(lengths) - {0}):
        alike = [i for i, own in enumerate(lengths) if own == length]
        some = reader.stacked([rows[i] for i in alike], 0)
        reader.read_on(some, torch.cat([tokens[i] for i in alike]).to(device))
        for place, i in enumerate(alike):
            read[i] = some.rows([place])
    batch = reader.stacked(read, 0)
    if left is not None:
        batch.unread_ids = left
    return batch


def read_questions(
    reader: Reader, cache: RetainedCache, questions: Tensor, padding: list[int]
) -> Tensor:
    """Read questions of different lengths, all but their last tokens.

    Returns:
        [B, n] long: all that the cache knows then, padded on the left, and the last tokens.
    """
    one = questions.shape[1] - max(padding) + cache.unread_ids.shape[1] == 1
    if one or not reader.asks_together or cache.recall is not None:
        what = "a question of one token" if one else "with decode_interval or recall, questions"
        raise ValueError(
            f"attention_mask holds zeros: {what} cannot be asked together with longer ones; "
            "ask rows of equal length, or one row at a time"
        )
    rows = [cache.rows([i]) for i in range(len(padding))]
    before = [questions[i : i + 1, skip:-1] for i, skip in enumerate(padding)]
    cache.restore(together(reader, rows, before).snapshot())
    assert cache.token_ids is not None
    return torch.cat([cache.token_ids.to(questions.device), questions[:, -1:]], dim=1)


def _freeze(reader: Reader, cache: RetainedCache) -> None:
    """Rotate what a cache holds, as those have that were asked before."""
    for at, layer in zip(reader.backbone.layers, cache.layers, strict=True):
        if layer.window is None and not layer.is_empty:
            freeze(layer, at.rotary, cache.prompt_lengths)
