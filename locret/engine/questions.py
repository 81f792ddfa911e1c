"""Contexts of one row each that are asked together, with questions of any lengths.

B rows of a batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.engine.passes import freeze
from locret.engine.reading import Reader


def together(
    reader: Reader, rows: Sequence[RetainedCache], questions: Sequence[Tensor]
) -> RetainedCache:
    """Caches of one row each as one batch, after tokens [1, n] more of each, or none. Empties
    `rows`.

    Raises:
        ValueError: no caches, or one of several rows; some caches have no question and others do,
            or some have tokens to read that may evict units (`decode_interval`).
    """
    if not rows or any(len(row.unread_ids) != 1 for row in rows):
        raise ValueError(
            f"together takes one or more caches of one row each; got {len(rows)}, with "
            f"{[len(row.unread_ids) for row in rows]} rows: take them apart with cache.rows"
        )
    if len(questions) not in (0, len(rows)):
        raise ValueError(
            f"{len(questions)} questions for {len(rows)} caches; expected one for each, or none"
        )
    if len({layer.rotated for row in rows for layer in row.retained_layers}) > 1:
        for row in rows:
            _freeze(reader, row)
    unread = [row.unread_ids for row in rows]
    if not questions and len({ids.shape[1] for ids in unread}) == 1:
        batch = reader.stacked(rows, 0)
        batch.unread_ids = torch.cat(unread)  # it is read with the next question
        return batch
    if reader.config.reading.decode_interval and rows[0].budget is not None:
        raise ValueError(
            "decode_interval: contexts cannot read questions together, nor can those that were "
            "asked before stand beside fresh ones; ask one at a time"
        )
    asked = [question.cpu() for question in questions] or [ids[:, :0] for ids in unread]
    # Stacking forgets what is unread.
    tokens = [torch.cat(both, dim=1) for both in zip(unread, asked, strict=True)]
    return _after(reader, lambda alike: reader.stacked([rows[i] for i in alike], 0), tokens)


def _after(
    reader: Reader, take: Callable[[list[int]], RetainedCache], tokens: Sequence[Tensor]
) -> RetainedCache:
    """All rows as one batch after what is unread of each and tokens [1, n] more, which may be none;
    those that read equally many read at once.

    Args:
        take: some rows as a cache of their own.
    """
    device = reader.backbone.layers[0].device  # that of the model is "meta" where weights wait
    lengths = [ids.shape[1] for ids in tokens]
    read: dict[int, RetainedCache] = {}
    for length in sorted(set(lengths)):
        alike = [i for i, own in enumerate(lengths) if own == length]
        some = take(alike)
        if length + some.unread_ids.shape[1]:
            reader.read_on(some, torch.cat([tokens[i] for i in alike]).to(device))
        read |= {i: some.rows([place]) for place, i in enumerate(alike)}
    return reader.stacked([read[i] for i in range(len(tokens))], 0)


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
    before = [questions[i : i + 1, skip:-1] for i, skip in enumerate(padding)]
    cache.restore(_after(reader, cache.rows, before).snapshot())
    assert cache.token_ids is not None
    return torch.cat([cache.token_ids.to(questions.device), questions[:, -1:]], dim=1)


def _freeze(reader: Reader, cache: RetainedCache) -> None:
    """Rotate what a cache holds, as those have that were asked before."""
    for at, layer in zip(reader.backbone.layers, cache.layers, strict=True):
        if layer.window is None and not layer.is_empty:
            freeze(layer, at.rotary, cache.prompt_lengths)
