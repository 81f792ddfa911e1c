"""Causal attention of sequences of different lengths in one call of PyTorch's `varlen_attn`, on
NVIDIA GPUs in half precision; and of texts that stand in one row, each of which sees keys of its
own: elsewhere, and in layers that weigh otherwise, by one call of `attend` each, the twin that
tests compare with. Gradients flow either way.

B rows, H KV heads, G query heads a KV head, T tokens of a row, S what a text sees, D head size.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from locret.cache.context import sent
from locret.model.backends import Backend, attend
from locret.model.hooks import PLAIN, Weighting

_ELEMENTS = 2**28  # of the keys of one call: texts that share a context see a copy of it each

_OPTIONS = inspect.signature(varlen_attn).parameters
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _OPTIONS else {}
"""PyTorch 2.11 takes fewer KV heads than query heads without being told."""


def takes_flash(query: Tensor) -> bool:
    """Whether PyTorch's flash attention computes with queries [..., D]."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    size = query.shape[-1]
    return (
        size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def fits(query: Tensor, backend: str) -> bool:
    """Whether `attend_lengths` takes queries [..., D] in place of a backend."""
    return backend in ("sdpa", "cudnn") and torch.version.cuda is not None and takes_flash(query)


def attend_lengths(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: Sequence[int],
    lengths: Sequence[int],
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last tokens of each sequence to all of it (lower-right causal).

    Args:
        query: [sum of tokens, heads, D], one sequence after the other.
        keys, values: [sum of lengths, KV heads, D], likewise.
        tokens, lengths: of each sequence; never more tokens than units.
        scaling: softmax scale.

    Returns:
        Output [sum of tokens, heads, D], and the log-sum-exp of each softmax, natural, float32
        [heads, sum of tokens].
    """
    output, sums = varlen_attn(
        query,
        keys,
        values,
        _bounds(tuple(tokens), query.device),
        _bounds(tuple(lengths), query.device),
        max(tokens),
        max(lengths),
        scale=scaling,
        window_size=(-1, 0),
        return_aux=AuxRequest(lse=True),
        **_GROUPED,
    )
    assert sums.shape == (query.shape[1], len(query)), sums.shape
    return output, sums


@functools.lru_cache(maxsize=256)  # of all layers
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each of sequences of these lengths begins, and the last one ends, int32."""
    with torch.inference_mode(False):  # training may ask for what an engine asked for first
        return sent((0, *accumulate(lengths)), device, torch.int32)


class Text(NamedTuple):
    """What the tokens of one text see.

    Attributes:
        tokens: of the text, T of the row together.
        keys, values: [B, H, s, D] each, one after the other, keys rotated; the last `tokens` of
            them are the text's own.
    """

    tokens: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """S."""
        return sum(key.shape[2] for key in self.keys)


def attend_texts(
    query: Tensor,
    texts: Sequence[Text],
    scaling: float,
    backend: Backend,
    weighting: Weighting = PLAIN,
) -> tuple[Tensor, Tensor | None]:
    """Each text's tokens see what their text sees, up to themselves (lower-right causal).

    Args:
        query: [B, H*G, T, D], rotated, of one text after the other.
        texts: in order.
        scaling, backend, weighting: as of `locret.model.backends.attend`.

    Returns:
        Output [B, T, H*G, D], and the log-sum-exp of each softmax, natural, float32 [B, H*G, T]:
        what labels would compute again. None where texts do not take one call.
    """
    if takes_varlen(query, backend, weighting):
        groups = list(_groups(texts))
        queries = query[0].transpose(0, 1).split([sum(t.tokens for t in each) for each in groups])
        pairs = zip(queries, groups, strict=True)
        outputs, sums = zip(*(_attend_at_once(q, each, scaling) for q, each in pairs), strict=True)
        return torch.cat(outputs)[None], torch.cat(sums, dim=1)[None]
    queries = query.split([text.tokens for text in texts], dim=2)
    each = [
        attend(own, _joined(text.keys), _joined(text.values), scaling, backend, weighting=weighting)
        for own, text in zip(queries, texts, strict=True)
    ]
    return torch.cat(each, dim=1), None


def takes_varlen(query: Tensor, backend: Backend, weighting: Weighting) -> bool:
    """Whether texts take one call for all of them."""
    return len(query) == 1 and weighting.plain and fits(query, backend)


def _attend_at_once(query: Tensor, texts: Sequence[Text], scaling: float) -> tuple[Tensor, Tensor]:
    """Output [T, H*G, D] of queries [T, H*G, D], and log-sum-exps [H*G, T]."""
    keys, values = (
        _joined([x for text in texts for x in getattr(text, name)])[0].transpose(0, 1)
        for name in ("keys", "values")
    )
    tokens, lengths = (tuple(t.tokens for t in texts), tuple(t.length for t in texts))
    return attend_lengths(query, keys, values, tokens, lengths, scaling)


def _groups(texts: Sequence[Text]) -> Iterator[list[Text]]:
    """Texts that take one call, of which the keys have at most `_ELEMENTS`."""
    group: list[Text] = []
    elements = 0
    for text in texts:
        own = text.length * text.keys[0].shape[1] * text.keys[0].shape[3]
        if group and elements + own > _ELEMENTS:
            yield group
            group, elements = [], 0
        group.append(text)
        elements += own
    yield group


def _joined(each: Sequence[Tensor]) -> Tensor:
    return each[0] if len(each) == 1 else torch.cat(list(each), dim=2)
