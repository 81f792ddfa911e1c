"""Causal attention of sequences of different lengths in one call of PyTorch's `varlen_attn`, on
NVIDIA GPUs in half precision. cuDNN, one call a sequence, is faster where there is much to compute,
but makes a plan for every length it meets (about 10 ms), and its calls cost the host more than a
small model's GPU needs.

B rows, H KV heads, G query heads a KV head, Q = B * H sequences, T new tokens, D head size.
"""

import functools
import inspect
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from locret.cache.sequences import Sequences, sent
from locret.model.past import Past

_MOST_WORK = 2**38  # FLOP of a call, half a millisecond: above that cuDNN gains more than it costs

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
) -> Tensor:
    """Causal attention of the last tokens of each sequence to all of it (lower-right causal).

    Args:
        query: [sum of tokens, heads, D], one sequence after the other.
        keys, values: [sum of lengths, KV heads, D], likewise.
        tokens, lengths: of each sequence; never more tokens than units.
        scaling: softmax scale.

    Returns:
        [sum of tokens, heads, D].
    """
    output = varlen_attn(
        query,
        keys,
        values,
        _bounds(tuple(tokens), query.device),
        _bounds(tuple(lengths), query.device),
        max(tokens),
        max(lengths),
        scale=scaling,
        window_size=(-1, 0),
        **_GROUPED,
    )
    assert isinstance(output, Tensor)
    return output


@functools.lru_cache(maxsize=256)  # of all layers
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each of sequences of these lengths begins, and the last one ends, int32."""
    with torch.inference_mode(False):  # training may ask for what an engine asked for first
        return sent((0, *accumulate(lengths)), device, torch.int32)


def takes_ragged(query: Tensor, pasts: Sequence[Past], backend: str) -> bool:
    """Whether queries [B, H*G, T, D] see `pasts` and themselves by `attend_ragged`."""
    ragged = any(past.sequences is not None for past in pasts)
    if not ragged or not fits(query, backend):
        return False
    group = query.shape[1] // pasts[0].heads
    work = 4 * query.shape[2] * group * sum(past.keys.numel() for past in pasts)
    return work <= _MOST_WORK


def attend_ragged(
    query: Tensor, pasts: Sequence[Past], new: tuple[Tensor, Tensor], scaling: float
) -> Tensor:
    """Causal attention of new tokens to themselves and to all of what is past: the units of one row
    and KV head, the new ones last, are a sequence, and so are the queries of its group.

    Args:
        query: [B, H*G, T, D], rotated.
        pasts: what they all see, the oldest first, without a bias.
        new: keys (rotated) and values [B, H, T, D].
        scaling: softmax scale.

    Returns:
        [B, T, H*G, D].
    """
    (rows, heads, count, size), every = new[0].shape, [*pasts, Past(*new)]
    keys = [*zip(*(_each(past.keys, past.sequences) for past in every), strict=True)]
    values = [*zip(*(_each(past.values, past.sequences) for past in every), strict=True)]
    lengths = [sum(map(len, own)) for own in keys]
    grouped = query.reshape(rows * heads, -1, count, size).transpose(1, 2)  # [Q, T, G, D]
    flat = grouped.reshape(rows * heads * count, -1, size)
    output = attend_lengths(
        flat, _cat(keys), _cat(values), [count] * len(lengths), lengths, scaling
    )
    grouped = output.view(rows, heads, count, -1, size).transpose(1, 2)
    return grouped.reshape(rows, count, -1, size).contiguous()


def _each(x: Tensor, sequences: Sequences | None) -> Sequence[Tensor]:
    """What every sequence has of keys or values of a `Past`, [units, D]."""
    return [own for row in x for own in row] if sequences is None else x.split(sequences.flat)


def _cat(each: Sequence[Sequence[Tensor]]) -> Tensor:
    """What sequences have of several pasts, as `attend_lengths` takes it."""
    return torch.cat([*chain.from_iterable(each)])[:, None]
