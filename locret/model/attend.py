"""Causal attention of new tokens to themselves and to all of what is past (`attend_past`).

What is past, every new token sees: with `cudnn` and `sdpa` attention to it, a sequence at a time
where heads hold different numbers of units, is merged by log-sum-exp with that of the new tokens to
themselves, a causal square; or all sequences take one call (`locret.model.varlen`), which is faster
where there is little to compute: cuDNN makes a plan for every length it meets (about 10 ms). Few
queries on a CPU take one softmax over all. The other backends see all units of a sequence side by
side (`locret.model.backends`).

B batch, H KV heads, G query heads a KV head, Q = B * H sequences, T new tokens, S units, R queries
of a KV head (G * T), D head size.
"""

import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from locret.cache.context import Sequences
from locret.heads.quotas import is_on_grid
from locret.kernels import merge_attention
from locret.model.backends import (
    CUDNN_CHANNELS,
    Backend,
    attend,
    multiplies_bfloat16,
    multiplies_fast,
)
from locret.model.hooks import PLAIN, Weighting
from locret.model.varlen import attend_lengths, fits, takes_flash

SPLIT_FROM = 128  # new tokens; below that two calls and a merge cost more than one call

_FEW = 32  # most queries of a KV head (R) that are few
_LONG = 2**13  # units of a product from which on bfloat16 gains more than a call costs


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


_MOST_WORK = 2**38  # FLOP of a call, half a millisecond: above that cuDNN gains more than it costs


def attend_past(
    query: Tensor,
    pasts: Sequence[Past],
    new: tuple[Tensor, Tensor] | None,
    scaling: float,
    backend: Backend,
    weighting: Weighting = PLAIN,
) -> Tensor:
    """Causal attention of new tokens to themselves and to all of what is past: [B, T, H*G, D].

    Args:
        query: [B, H*G, T, D], rotated.
        pasts: what they all see, the oldest first.
        new: keys (rotated) and values [B, H, T, D]; None = those of a single token, which are the
            last of the last past.
        scaling, backend, weighting: as of `attend`; no window, and no softcap where a past has a
            bias.
    """
    if any(past.bias is not None for past in pasts):
        wide = with_bias_in_channels(query, pasts, new, scaling)
        if backend == "cudnn" and wide[0].shape[3] > CUDNN_CHANNELS:
            backend = "sdpa"
        return attend_past(*wide, scaling, backend, weighting)[..., : query.shape[3]]
    pasts = [past.as_rectangle() for past in pasts if past.length]
    if not pasts and new is not None:
        return attend(query, *new, scaling, backend, None, weighting)
    several = query.shape[2] > 1 and weighting.plain
    if new is not None and several and takes_ragged(query, pasts, backend):
        return attend_ragged(query, pasts, new, scaling)
    if backend == "sdpa" and weighting.plain and are_few(query, pasts, new):
        return attend_few(query, pasts, new, scaling)
    if not (weighting.plain and _leaves_sums(query, backend)):
        return _attend_joined(query, pasts, new, scaling, backend, weighting)
    states = [_over(query, past, scaling, backend) for past in pasts]
    if new is not None:
        states.append(_attention(query, *new, scaling, backend, causal=True))
    if len(states) == 1:
        return states[0][0].transpose(1, 2).contiguous()
    return merge_attention(*_merged(states[:-1]), *states[-1])


def _leaves_sums(query: Tensor, backend: Backend) -> bool:
    """Whether attention over some of the units says how much weight they have, so that it can be
    merged with that over others."""
    if backend == "cudnn":
        return query.shape[2] >= SPLIT_FROM
    return backend == "sdpa" and query.device.type in ("cpu", "cuda") and not multiplies_fast(query)


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
    heads = pasts[0].heads if new is None else new[0].shape[1]
    if query.device.type != "cpu" or query.shape[1] // heads * query.shape[2] > _FEW:
        return False
    if query.dtype == torch.float32:
        return True
    return multiplies_bfloat16(query) and any(map(_is_long, pasts))


def _is_long(past: Past) -> bool:
    """Whether the sequences of a past take few products, for what they hold."""
    runs = 1 if past.sequences is None else len([*groupby(past.sequences.flat)])
    return past.keys.shape[:-1].numel() >= runs * _LONG


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
    logits = _logits(grouped, every)
    if tokens > 1:
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        future = future.repeat(grouped.shape[2] // tokens, 1)
        logits[..., -tokens:].masked_fill_(future, -torch.inf)
    shares = logits.softmax(dim=-1).split([past.length for past in every], dim=-1)
    output = functools.reduce(torch.add, map(_weighed, shares, every))
    return output.reshape(rows, -1, tokens, output.shape[3]).transpose(1, 2).contiguous()


def _logits(query: Tensor, pasts: Sequence[Past]) -> Tensor:
    """Logits [B, H, R, units of all pasts] of queries [B, H, R, D], but for a constant a query;
    -inf where a sequence is shorter than others."""
    ends, flat = [*accumulate(past.length for past in pasts)], query.flatten(0, 1)
    less = flat.new_zeros(*flat.shape[:2], 1)
    if flat.dtype != torch.float32:
        # What is rounded to few bits shall be small, and softmax is the same with less of all.
        less = flat @ _newest(pasts[-1]).transpose(1, 2)
    logits = query.new_full((*query.shape[:3], ends[-1]), -torch.inf)
    places = logits.flatten(0, 1)
    for past, end in zip(pasts, ends, strict=True):
        first = end - past.length
        for some, keys in _alike(past.keys, past.sequences):
            # Keys on the left: where others stand behind them, products with their transpose copy.
            one, queries = (x[some].transpose(1, 2) for x in (less, flat))
            product = torch.baddbmm(one, keys, queries, beta=-1)
            places[some, :, first : first + keys.shape[1]] = product.transpose(1, 2)
    return logits


def _newest(past: Past) -> Tensor:
    """The last key of every sequence, [Q, 1, D]."""
    if past.sequences is None:
        return past.keys[:, :, -1:].flatten(0, 1)
    return past.keys[past.sequences.offsets[1:].long() - 1][:, None]


def _weighed(shares: Tensor, past: Past) -> Tensor:
    """The values [B, H, R, D] by shares [B, H, R, units of the longest sequence]."""
    flat = shares.flatten(0, 1)
    each = [
        flat[some, :, : values.shape[1]] @ values
        for some, values in _alike(past.values, past.sequences)
    ]
    return torch.cat(each).unflatten(0, shares.shape[:2])


def _alike(x: Tensor, sequences: Sequences | None) -> Iterator[tuple[slice, Tensor]]:
    """Keys or values of a `Past` as rectangles [sequences, units, D], each of neighbours that are
    equally long, and which of all sequences they are."""
    if sequences is None:
        yield slice(None), x.flatten(0, 1)
        return
    first = 0
    for length, some in groupby(sequences.flat):
        last = first + len([*some])
        units = slice(sequences.bounds[first], sequences.bounds[last])
        yield slice(first, last), x[units].unflatten(0, (last - first, length))
        first = last


def _attend_joined(
    query: Tensor,
    pasts: Sequence[Past],
    new: tuple[Tensor, Tensor] | None,
    scaling: float,
    backend: Backend,
    weighting: Weighting,
) -> Tensor:
    """`attend_past` with all units of a sequence put side by side: the plain form."""
    every = [*pasts, *([] if new is None else [Past(*new)])]
    if all(past.sequences is None for past in every):
        keys = torch.cat([past.keys for past in every], dim=2)
        values = torch.cat([past.values for past in every], dim=2)
        return attend(query, keys, values, scaling, backend, None, weighting)
    some = next(past.sequences for past in every if past.sequences is not None)
    (rows, heads), outputs = some.shape, []
    group = query.shape[1] // heads
    for row in range(rows):
        for head in range(heads):
            of_head = slice(head * group, (head + 1) * group)
            each = zip(*(past.of(row, head) for past in every), strict=True)
            keys, values = (torch.cat(x, dim=2) for x in each)
            own = query[row : row + 1, of_head]
            its = weighting.of_heads(of_head)
            outputs.append(attend(own, keys, values, scaling, backend, None, its))
    joined = torch.stack(outputs).view(rows, heads, *outputs[0].shape[1:])
    return joined.transpose(1, 2).flatten(2, 3)


def _over(query: Tensor, past: Past, scaling: float, backend: Backend) -> tuple[Tensor, Tensor]:
    """Attention of every query to all of a past: output [B, H*G, T, D], log-sum-exp [B, H*G, T]
    (natural, float32)."""
    sequences = past.sequences
    if sequences is None:
        return _attention(query, past.keys, past.values, scaling, backend, causal=False)
    rows, heads = sequences.shape
    queries = query.unflatten(1, (heads, -1))
    states = [
        _over_sequence(queries[row : row + 1, head], past, row, head, scaling, backend)
        for row in range(rows)
        for head in range(heads)
    ]
    joined = (torch.cat(each).unflatten(0, (rows, heads)) for each in zip(*states, strict=True))
    output, sums = (x.flatten(1, 2) for x in joined)
    return output, sums


def _over_sequence(
    query: Tensor, past: Past, row: int, head: int, scaling: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """`_over` of one group's queries [1, G, T, D] and one sequence, which may be empty."""
    assert past.sequences is not None
    units = past.sequences.counts[row][head]
    if not units:
        sums = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
        return torch.zeros_like(query), sums
    # cuDNN makes a plan, which takes milliseconds, for every number that it meets.
    by = backend if is_on_grid(units) else "sdpa"
    return _attention(query, *past.of(row, head), scaling, by, causal=False)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, backend: Backend, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of [B, H*G, T, D] over [B, H, S, D], S = T if it is causal."""
    if backend == "cudnn":
        output, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scaling
        )
        return output, sums.reshape(query.shape[:3])
    batch, heads, tokens = query.shape[:3]
    if causal:
        group = heads // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    else:  # the tokens of a group's heads side by side, so that nothing is repeated
        query = query.reshape(batch, key.shape[1], -1, query.shape[3])
    if takes_flash(query):
        output, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scaling
        )
    elif query.is_cuda:
        output, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scaling
        )
        sums = sums[:, :, : query.shape[2]]
    else:
        output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scaling
        )
    return output.reshape(batch, heads, tokens, -1), sums.float().reshape(batch, heads, tokens)


def _merged(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over several sets of units together: output and log-sum-exp."""
    output, sums = states[0]
    for other, more in states[1:]:
        both = torch.logaddexp(sums, more)
        share, rest = ((x - both).exp().nan_to_num(0.0)[..., None] for x in (sums, more))
        output, sums = (output.float() * share + other.float() * rest).to(other.dtype), both
    return output, sums


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
    output, _ = attend_lengths(
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
