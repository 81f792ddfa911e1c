"""Which words of a text a context still holds, as HTML: a strip over all of it, and one passage."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.serve.texts import TextOf

CELLS = 200
"""Most cells of a strip."""
PASSAGE = 400
"""Tokens of a passage."""
CSS = """
.strip { display: flex; height: 48px; border: 1px solid currentColor; }
.strip i { flex: 1; background: rgb(249 115 22 / var(--share)); }
.strip i.shown { box-shadow: inset 0 -5px currentColor; }
.words { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; }
.words span { background: rgb(249 115 22 / var(--share)); }
"""


def shares_of(cache: RetainedCache, layer: int | None = None, head: int | None = None) -> Tensor:
    """What share of the KV heads holds each token that was read: [seen] float32 on the CPU, 0 to 1.

    Args:
        cache: of one row.
        layer: of the heads; None = every layer.
        head: of every such layer; None = all heads.
    """
    layers = cache.layers if layer is None else [cache.layers[layer]]
    heads = [one.source_positions[0] for one in layers]
    chosen = [p for of_layer in heads for p in (of_layer if head is None else [of_layer[head]])]
    counts = torch.zeros(cache.seen)
    for positions in chosen:
        counts[positions.cpu()] += 1
    return counts / len(chosen)


def passage(seen: int, place: float) -> range:
    """The tokens of a passage of a text of `seen` tokens.

    Args:
        place: 0 = the text's beginning, to 1 = its end.
    """
    first = round(place * max(seen - PASSAGE, 0))
    return range(first, min(first + PASSAGE, seen))


def strip(shares: Tensor, shown: range) -> str:
    """The whole text as a strip of cells: the darker, the more of it is held.

    Args:
        shares: of each token (`shares_of`).
        shown: the tokens of the passage below it (`passage`).
    """
    bounds = torch.linspace(0, len(shares), min(CELLS, len(shares)) + 1).long().tolist()
    cells = [
        f"<i {_colour(share := shares[a:b].mean().item())}{' class=shown' * (a in shown)} "
        f'title="tokens {a + 1:,} to {b:,}: {share:.0%} held"></i>'
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return f'<div class="strip">{"".join(cells)}</div>'


def words(tokenizer: Any, tokens: Sequence[int], shares: Sequence[float]) -> str:
    """The words of one passage, each the darker, the more heads hold it.

    Args:
        tokenizer: of the model.
        tokens: of the passage.
        shares: of each of them (`shares_of`).
    """
    spans = [
        f'<span {_colour(share)} title="{share:.0%} held">{escape(text)}</span>'
        for text, share in _pieces(tokenizer, tokens, shares)
        if text
    ]
    return f'<div class="words">{"".join(spans)}</div>'


def _pieces(
    tokenizer: Any, tokens: Sequence[int], shares: Sequence[float]
) -> Iterator[tuple[str, float]]:
    """Texts of whole characters, and the share of the token that completes each."""
    text = TextOf(tokenizer)
    for token, share in zip(tokens, shares, strict=True):
        yield text.add(token), share
    yield text.end(), shares[-1]


def _colour(share: float) -> str:
    return f'style="--share:{share**0.5:.2f}"'  # the root, because an eighth shall be seen too
