"""What every new token sees, and attention to it by products of matrices, where that is faster than
fused attention: of a few queries on a CPU, and of many in bfloat16 on some CPUs.

B batch, H KV heads, G query heads a KV head, T new tokens, S units, R queries of a KV head (G * T),
D head size.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from locret.cache.sequences import Sequences

_FEW = 32
"""Most queries of a KV head (R) that are few."""
_BLOCK = 64
"""New tokens that `attend_by_products` takes at a time: their logits shall fit a cache."""
_LOGITS = 2**20
"""Logits that it has in memory at a time: it takes as many heads as have no more, at least one."""


class Past(NamedTuple):
    """Units that every new token sees.

    Attributes:
        keys, values: flat [N, D] over `sequences`, keys rotated; or rectangles [B, H, S, D] where
            that is None.
        sequences: how many units each row and head has.
        bias: [N], or [B, H, S], float32, added to the logits of each unit; None = nothing.
    """

    keys: Tensor
    values: Tensor
    sequences: Sequences | None = None
    bias: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.keys.shape[1] if self.sequences is None else self.sequences.shape[1]

    @property
    def length(self) -> int:
        """Units of the longest sequence."""
        return self.keys.shape[2] if self.sequences is None else self.sequences.longest

    def as_rectangle(self) -> "Past":
        """The same as a rectangle, if all sequences are equally long."""
        if self.sequences is None or not self.sequences.equal:
            return self
        return Past(self.sequences.rectangle(self.keys), self.sequences.rectangle(self.values))

    def of(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, 1, S, D] of one sequence."""
        if self.sequences is None:
            return tuple(x[row : row + 1, head : head + 1] for x in self[:2])  # type: ignore[return-value]
        at = row * self.sequences.shape[1] + head
        units = slice(*self.sequences.bounds[at : at + 2])
        # Strides of the whole would tell how long all sequences are together, and cuDNN would make
        # a plan, which takes milliseconds, for every such length.
        return self.keys[units][None, None], self.values[units][None, None]


def with_bias_in_channels(
    query: Tensor, pasts: Sequence[Past], new: tuple[Tensor, Tensor] | None, scaling: float
) -> tuple[Tensor, list[Past], tuple[Tensor, Tensor] | None]:
    """The same attention, but for further channels, of pasts without a bias: channels of the keys
    carry it, which every fused attention takes.

        (scaling q) . k + bias = scaling (q, 1, 1) . (k, high, low),  high + low = bias / scaling

    Two channels hold it, because one of few bits is not exact enough. Heads are filled up to a
    multiple of 8 channels. Arguments as of `locret.model.attend.attend_past`.
    """
    more = 2 + -(query.shape[3] + 2) % 8

    def wider(x: Tensor, *first: Tensor) -> Tensor:
        extra = x.new_zeros(*x.shape[:-1], more)
        for channel, values in enumerate(first):
            extra[..., channel] = values
        return torch.cat([x, extra], dim=-1)

    def carried(past: Past) -> Past:
        high_low = () if past.bias is None else _split(past.bias / scaling, past.keys.dtype)
        return Past(wider(past.keys, *high_low), wider(past.values), past.sequences)

    one = query.new_ones(query.shape[:3])
    fresh = None if new is None else (wider(new[0]), wider(new[1]))
    return wider(query, one, one), [*map(carried, pasts)], fresh


def _split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x`, float32, as the sum of two numbers of a dtype."""
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).to(dtype)


def are_few(query: Tensor, pasts: Sequence[Past], new: tuple[Tensor, Tensor] | None) -> bool:
    """Whether `attend_few` is faster than fused attention to each of `pasts` and to the new tokens;
    arguments as of `locret.model.attend.attend_past`."""
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return False
    heads = pasts[0].heads if new is None else new[0].shape[1]
    return query.shape[1] // heads * query.shape[2] <= _FEW


def attend_few(
    query: Tensor, pasts: Sequence[Past], new: tuple[Tensor, Tensor] | None, scaling: float
) -> Tensor:
    """Attention of few queries by one softmax over the logits of all units: [B, T, H*G, D].

    Args:
        query: [B, H*G, T, D], rotated.
        pasts: what they all see; at least one where `new` is None.
        new: keys (rotated) and values [B, H, T, D], causal; None = those of a single token, which
            are in the last past.
        scaling: softmax scale.
    """
    every = [*pasts, *([] if new is None else [Past(*new)])]
    rows, tokens, heads = query.shape[0], query.shape[2], every[0].heads
    grouped = query.reshape(rows, heads, -1, query.shape[3]) * scaling  # [B, H, G*T, D]
    logits = torch.cat([_logits(grouped, past) for past in every], dim=-1)
    if tokens > 1:
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        future = future.repeat(grouped.shape[2] // tokens, 1)
        logits[..., -tokens:].masked_fill_(future, -torch.inf)
    shares = logits.softmax(dim=-1).split([past.length for past in every], dim=-1)
    output = functools.reduce(torch.add, map(_weighed, shares, every))
    return output.reshape(rows, -1, tokens, output.shape[3]).transpose(1, 2).contiguous()


def multiplies_fast(query: Tensor) -> bool:
    """Whether `attend_by_products` is faster than PyTorch's fused attention, of a CPU: that one
    multiplies bfloat16 at the speed of float32, unless the CPU has tiles (AMX)."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or query.shape[2] < _FEW:
        return False
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last T of S slots, some KV heads and a block of queries at a time:
    [B, H*G, T, D].

    Args:
        query: [B, H*G, T, D], rotated. key, value: [B, H, S, D], S >= T, rotated.
        scaling: softmax scale.
    """
    heads, slots, tokens = key.shape[1], key.shape[2], query.shape[2]
    queries = query.unflatten(1, (heads, -1)).flatten(0, 1)  # [B * H, G, T, D]
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    output = torch.empty_like(queries, memory_format=torch.contiguous_format)
    at_once = max(1, _LOGITS // (queries.shape[1] * min(_BLOCK, tokens) * slots))
    for first in range(0, len(keys), at_once):
        # One matrix is in memory as products read it whatever they take of it; several are copied.
        at = first if at_once == 1 else slice(first, first + at_once)
        _attend_heads(queries[at], keys[at], values[at], scaling, output[at])
    return output.view(query.shape)


def _attend_heads(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, output: Tensor
) -> None:
    """Attention of queries [..., G, T, D] to [..., S, D], written to `output`."""
    group, tokens, size = query.shape[-3:]
    # Products of bfloat16 are rounded to it, and the softmax is the same without the mean key:
    # logits are smaller then, and exact enough for models whose keys have large biases.
    exact = key.float()
    key = (exact - exact.mean(dim=-2, keepdim=True)).mul_(scaling).to(key.dtype)
    future = query.new_full((_BLOCK, _BLOCK), -torch.inf).triu(1)
    for start in range(0, tokens, _BLOCK):
        end = min(start + _BLOCK, tokens)
        new, last = end - start, key.shape[-2] - tokens + end  # later slots are all future
        queries = query[..., start:end, :].reshape(*key.shape[:-2], -1, size)  # G * new
        logits = queries @ key[..., :last, :].transpose(-1, -2)
        logits.unflatten(-2, (group, new))[..., -new:].add_(future[:new, :new])
        weighed = logits.softmax(dim=-1) @ value[..., :last, :]
        output[..., start:end, :] = weighed.unflatten(-2, (group, new))


def _logits(query: Tensor, past: Past) -> Tensor:
    """[B, H, R, units of the longest sequence] of queries [B, H, R, D]; -inf where a sequence is
    shorter."""
    if past.sequences is None:
        return query @ past.keys.transpose(-1, -2)
    logits = query.new_full((*query.shape[:3], past.length), -torch.inf)
    each = past.keys.split(past.sequences.flat)
    for out, own, keys in zip(logits.flatten(0, 1), query.flatten(0, 1), each, strict=True):
        out[:, : len(keys)] = own @ keys.T
    return logits


def _weighed(shares: Tensor, past: Past) -> Tensor:
    """The values [B, H, R, D] by shares [B, H, R, units of the longest sequence]."""
    if past.sequences is None:
        return shares @ past.values
    each = zip(shares.flatten(0, 1), past.values.split(past.sequences.flat), strict=True)
    own = [share[:, : len(values)] @ values for share, values in each]
    return torch.stack(own).unflatten(0, past.sequences.shape)
