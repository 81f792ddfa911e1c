"""Attention of one or a few new tokens, a decoding step, to contexts and tails, of whose filled
length only the device knows.

Split-KV flash decoding: the units of a sequence are divided among programs that each read their
keys and values once, for all query heads of the group, with an online softmax in float32; a second
kernel merges what they leave (`splits.py`). How many programs share a tail is fixed by shapes, what
each of them covers by the current length: a captured CUDA graph stays right and balanced while the
length grows.

A context may be packed, all but the last units of each sequence. Packed units are expanded in
registers or not at all. Their tiles, those of the plain units and the tails leave their states in
one buffer for one merge.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from locret.kernels.decode_general import PROGRAMS, PackedShares, attend_packed
from locret.kernels.decode_kivi import PROGRAMS as SMALL_PROGRAMS
from locret.kernels.decode_kivi import attend_small, takes_small
from locret.kernels.decode_rotated import PROGRAMS as SMALL_ROTATED_PROGRAMS
from locret.kernels.decode_rotated import (
    attend_small_rotated,
    rotate_queries,
    takes_small_rotated,
)
from locret.kernels.dispatch import (
    INTERPRETED,
    check_tensors,
    early,
    head_of,
    multiprocessors,
    on_device,
    padded,
    start_next,
    takes_triton,
    tl,
    triton,
    units_at,
    wait_for_last,
)
from locret.kernels.packed import PackedKV, RotatedKV
from locret.kernels.splits import (
    Shares,
    States,
    leave_average,
    leave_sum,
    number_of_tail_splits,
    queries_at,
    share_out,
    tile_at,
    weigh,
)

_PROGRAMS = 2  # programs that share a multiprocessor
_QUERIES = 128  # queries of a KV head (G * T) that one program holds
_START = 32  # units in whose time a program begins and ends
_PACKED_START = 64  # packed units, likewise


class Plain(NamedTuple):
    """What the B*H sequences of a step attend to that is not packed: contexts and tails.

    Attributes:
        keys, values: [N, D], the contexts one after the other; any of them may be empty.
        shares: of the contexts' lengths, as `decode_shares` gives them.
        tail_keys, tail_values: [B, H, C, D], storage of capacity C >= 0, any strides. What lies
            outside the filled slots may hold anything.
        tail_length: [1] int32 on the same device: slots filled, the new tokens' included; at
            most C.
    """

    keys: Tensor
    values: Tensor
    shares: Shares
    tail_keys: Tensor
    tail_values: Tensor
    tail_length: Tensor

    def check(self, query: Tensor) -> None:
        """Refuse what does not fit a query [B, H*G, T, D] and its dtype."""
        batch, heads, capacity, size = self.tail_keys.shape
        context, tail = (self.shares.units, size), (batch, heads, capacity, size)
        check_tensors(
            {
                "keys": (self.keys, query.dtype, context),
                "values": (self.values, query.dtype, context),
                "tail_keys": (self.tail_keys, query.dtype, tail),
                "tail_values": (self.tail_values, query.dtype, tail),
                "tail_length": (self.tail_length, torch.int32, (1,)),
            },
            contiguous=False,
        )
        if query.shape[0] != batch or query.shape[3] != size or query.shape[1] % heads:
            raise ValueError(
                f"query {tuple(query.shape)} does not fit tails {tail}: expected "
                f"[{batch}, a multiple of {heads}, T, {size}]"
            )
        if query.shape[1] // heads * query.shape[2] > _QUERIES:
            raise ValueError(
                f"query {tuple(query.shape)} on {heads} KV heads makes more than {_QUERIES} "
                "queries a KV head; read so many tokens with an attention backend"
            )
        if len(self.shares.lengths) != batch * heads:
            raise ValueError(
                f"shares are of {len(self.shares.lengths)} sequences; expected {batch} x {heads}"
            )

    def states(self, query: Tensor, tiles: int = 0) -> States:
        """Room for what programs leave of these and of so many other tiles."""
        sequences, heads, capacity = len(self.shares.lengths), *self.tail_keys.shape[1:3]
        at_once = _PROGRAMS * multiprocessors(query.device)
        tile = self.shares.units // max(1, self.shares.count)
        splits = number_of_tail_splits(sequences, capacity, tile, at_once)
        return States.empty(query, heads, tiles + self.shares.count, splits)


def decode_sequences(query: Tensor, plain: Plain, scaling: float) -> Tensor:
    """softmax(scaling q k) v over the context of each sequence and, after it, its tail.

    The T tokens are the last of the tail's filled slots, causal: token t sees the slots below
    tail_length - (T - 1 - t) and all of the context.

    Args:
        query: [B, H*G, T, D], rotated; G*T at most 128.
        plain: in query's dtype.
        scaling: factor of the logits.

    Returns:
        [B, H*G, T, D] in query's dtype; zeros where a token sees nothing.
    """
    plain.check(query)
    keys, values, shares, *tails = plain
    if not takes_triton(query, keys, values, shares.tiles, *tails):
        return decode_sequences_reference(query, plain, scaling)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel():
        states = plain.states(query)
        attend_sequences(query, plain, scaling, states)
        states.merge(out, [shares])
    return out


def decode_shares(lengths: Sequence[int], device: torch.device) -> Shares:
    """How `decode_sequences` divides contexts of these lengths among its programs.

    Programs that run at a time are left for the tails, lest those take a round of their own.
    """
    at_once = _PROGRAMS * multiprocessors(device)
    return share_out(lengths, max(at_once // 2, at_once - len(lengths), 1), device, start=_START)


def decode_sequences_reference(query: Tensor, plain: Plain, scaling: float) -> Tensor:
    keys, values, shares, tail_keys, tail_values, tail_length = plain
    batch, heads, capacity, size = tail_keys.shape
    group, new = query.shape[1] // heads, query.shape[2]
    longest = max(shares.lengths, default=0)
    grouped = scaling * query.reshape(batch * heads, group * new, size).float()
    slot = torch.arange(capacity, device=query.device)
    ends = tail_length - (new - 1 - torch.arange(new, device=query.device))
    hidden = (slot >= ends[:, None]).repeat(group, 1)  # [G*T, C]
    of_tail = grouped @ tail_keys.flatten(0, 1).float().mT
    shape = (*grouped.shape[:2], longest + capacity)
    logits = torch.full(shape, -torch.inf, device=query.device)
    logits[..., longest:] = of_tail.masked_fill(hidden, -torch.inf)
    for which, units in _by_sequence(keys, shares.lengths):
        logits[which, :, : units.shape[1]] = grouped[which] @ units.float().mT
    weights = logits.softmax(-1).nan_to_num(0.0)
    # Slots that nobody sees may hold NaN.
    tail = tail_values.flatten(0, 1).float().masked_fill((slot >= tail_length)[:, None], 0.0)
    out = weights[..., longest:] @ tail
    for which, units in _by_sequence(values, shares.lengths):
        out[which] += weights[which, :, : units.shape[1]] @ units.float()
    return out.view(query.shape).to(query.dtype)


def _by_sequence(flat: Tensor, lengths: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Which sequences, and their units [sequences, S, D] of flat ones: all at once if they are of
    equal length, one at a time otherwise."""
    if len(set(lengths)) == 1:
        yield slice(None), flat.view(len(lengths), lengths[0], flat.shape[1])
        return
    for i, units in enumerate(flat.split(lengths)):
        yield slice(i, i + 1), units[None]


def attend_sequences(
    query: Tensor, plain: Plain, scaling: float, states: States, at_state: int = 0
) -> bool:
    """Leave the attention over the tiles of the contexts, then over the tails, in `states`.

    Args: as of `decode_sequences`, and
        at_state: where the states of these tiles begin: after those of other tiles. The tails'
            come after these tiles', and the next kernel attends to those other tiles.

    Returns:
        Whether the next kernel may work while this one does (`locret.kernels.dispatch.early`).
    """
    keys, values, shares, *tails, tail_length = plain
    programs = shares.count + len(shares.lengths) * states.tail_splits
    if not programs:
        return False
    starting = early(query)
    heads, capacity, size = plain.tail_keys.shape[1:]
    queries, wide = states.weights.shape[1], padded(size, least=16)
    keys, values, tail_keys, tail_values = (
        units if units.stride(-1) == 1 else units.contiguous() for units in (keys, values, *tails)
    )
    with on_device(query):
        _attend[(programs,)](
            *(query, (keys, values), shares.tiles, (tail_keys, tail_values), tail_length),
            *((states.values, states.weights), at_state, shares.count, states.tail_splits),
            *(scaling * math.log2(math.e), heads, capacity, query.stride()),
            *((keys.stride(0), values.stride(0)), tail_keys.stride(), tail_values.stride()),
            NEW=query.shape[2],
            QUERIES=queries,
            SIZE=size,
            QUERY_BLOCK=padded(queries, least=16),
            SIZE_BLOCK=wide,
            UNITS=min(128, max(16, 16384 // (wide * query.element_size()))),
            UPCAST=INTERPRETED or query.dtype == torch.float32,
            BESIDE=at_state > 0,
            num_warps=8 if query.dtype == torch.float32 else 4,
            num_stages=3,
            **starting,
        )
    return at_state > 0 and starting["EARLY"]


@triton.jit(do_not_specialize=["at_state", "tile_count", "tail_splits", "heads", "capacity"])
def _attend(  # type: ignore[no-untyped-def]
    query, context, tiles, tail, tail_length, states, at_state, tile_count, tail_splits, scaling,
    heads, capacity, query_strides, unit_strides, tail_key_strides, tail_value_strides,
    NEW: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr, UNITS: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies bfloat16 blocks as integers
    BESIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    # A kernel that works beside this one reads what the last one wrote, and so begins after it.
    start_next(EARLY and not BESIDE)
    wait_for_last(EARLY)
    start_next(EARLY and BESIDE)
    # A tile of the context, or an equal share of what is filled now of a sequence's tail. Both
    # take one loop, which differs only in where its units begin and how far apart they are.
    program = tl.program_id(0)
    in_tail = program >= tile_count
    end = tl.minimum(tl.load(tail_length), capacity)
    if in_tail:
        sequence = (program - tile_count) // tail_splits
        share = (program - tile_count) % tail_splits
        each = tl.cdiv(tl.maximum(end, 0), tail_splits)
        start, stop = share * each, tl.minimum((share + 1) * each, end)
    else:
        sequence, start, stop = tile_at(tiles, program)
    b, h = head_of(sequence, heads)

    which = tl.arange(0, QUERY_BLOCK)
    d = tl.arange(0, SIZE_BLOCK)
    in_size = d < SIZE
    q_at = queries_at(query, query_strides, b, h, which, NEW, QUERIES)
    q_at = q_at[:, None] + d[None, :] * query_strides[3]
    q = tl.load(q_at, mask=(which < QUERIES)[:, None] & in_size[None, :], other=0.0)
    query_end = tl.where(in_tail, end - (NEW - 1 - which % NEW), stop)
    if UPCAST:
        q = q.to(tl.float32)

    unit = tl.arange(0, UNITS)
    first = start.to(tl.int64)
    k_s = tl.where(in_tail, tail_key_strides[2], unit_strides[0])
    v_s = tl.where(in_tail, tail_value_strides[2], unit_strides[1])
    tail_keys = units_at(tail[0], tail_key_strides, b, h, 0)
    tail_values = units_at(tail[1], tail_value_strides, b, h, 0)
    keys = tl.where(in_tail, tail_keys, context[0]) + first * k_s
    values = tl.where(in_tail, tail_values, context[1]) + first * v_s
    k_at = keys + d[:, None] + unit[None, :] * k_s  # transposed
    v_at = values + unit[:, None] * v_s + d[None, :]

    highest = tl.full((QUERY_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_BLOCK,), tl.float32)
    summed = tl.zeros((QUERY_BLOCK, SIZE_BLOCK), tl.float32)
    for at in tl.range(start, stop, UNITS):
        here = at + unit < stop
        k = tl.load(k_at, mask=here[None, :] & in_size[:, None], other=0.0)
        v = tl.load(v_at, mask=here[:, None] & in_size[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logits = tl.dot(q, k, input_precision="ieee") * scaling
        if NEW == 1:
            logits = tl.where(here[None, :], logits, float("-inf"))
        else:
            visible = here[None, :] & ((at + unit)[None, :] < query_end[:, None])
            logits = tl.where(visible, logits, float("-inf"))
        weights, shrink, highest, total = weigh(logits, highest, total)
        summed *= shrink[:, None]
        summed = tl.dot(weights.to(v.dtype), v, acc=summed, input_precision="ieee")
        k_at += UNITS * k_s
        v_at += UNITS * v_s

    to = leave_sum(states[1], at_state + program, which, highest, total, QUERIES)
    leave_average(states[0], to, which, d, in_size, total, summed, QUERIES, SIZE)


# ---- packed units --------------------------------------------------------------------------------


def decode_packed(
    query: Tensor,
    packed: PackedKV | RotatedKV,
    shares: PackedShares,
    plain: Plain,
    scaling: float,
    turned_query: Tensor | None = None,
) -> Tensor:
    """softmax(scaling q k) v over each sequence's packed units, its plain ones and its tail.

    Tokens are causal as of `decode_sequences`, and see all that comes before the tail.

    Args:
        query, plain, scaling: as of `decode_sequences`.
        packed: N units, keys rotated, of the B*H sequences one after the other; any of them may be
            empty.
        shares: of their lengths, as `packed_shares` gives them.
        turned_query: of units of `RotatedKV`, H q as `rotate_queries` and `store_rotated` make it;
            None = it is made here.

    Returns:
        [B, H*G, T, D] in query's dtype; zeros where a token sees nothing.
    """
    plain.check(query)
    packed.check(query.shape[3])
    if len(shares.lengths) != len(plain.shares.lengths) or shares.units != packed.count:
        raise ValueError(
            f"shares are of {len(shares.lengths)} sequences of {shares.units} units; expected "
            f"{len(plain.shares.lengths)}, of {packed.count}"
        )
    if not takes_triton(query, packed.starts, shares.tiles, plain.keys):
        return decode_packed_reference(query, packed, shares, plain, scaling)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    states = plain.states(query, shares.count)
    rotated = shares.count > 0 and isinstance(packed, RotatedKV)
    if rotated and turned_query is None:
        turned_query = rotate_queries(query)
    # First the few units that are not packed: they take as long as a kernel does to begin.
    beside = attend_sequences(query, plain, scaling, states, shares.count)
    if shares.count:
        _attend_packed((query, turned_query), packed, shares, scaling, states, beside)
    states.merge(out, [shares, plain.shares], rotated)
    return out


def _attend_packed(
    queries: tuple[Tensor, Tensor | None],
    packed: PackedKV | RotatedKV,
    shares: PackedShares,
    scaling: float,
    states: States,
    beside: bool,
) -> None:
    """Leave the attention over packed units in the first of `states`, by the kernel that fits.

    Args:
        queries: as they are, and turned by H for units of `RotatedKV`.
        beside: it may work while the last kernel does.
    """
    query, turned = queries
    if not _programs_if_small(packed, states.weights.shape[1], query.dtype):
        attend_packed(query, turned, packed, shares, scaling, states)
    elif isinstance(packed, PackedKV):
        attend_small(query, packed, shares, scaling, states)
    else:
        assert turned is not None
        attend_small_rotated(query, turned, packed, shares, scaling, states, beside)


def _programs_if_small(
    packed: PackedKV | RotatedKV, queries: int, dtype: torch.dtype
) -> int | None:
    """How many programs of the kernel for small queries share a multiprocessor; None = it does not
    cover so many queries a KV head of this dtype, or these units."""
    if isinstance(packed, PackedKV):
        return SMALL_PROGRAMS if takes_small(queries, dtype, packed) else None
    return SMALL_ROTATED_PROGRAMS if takes_small_rotated(queries, dtype, packed) else None


def packed_shares(
    packed: PackedKV | RotatedKV, lengths: Sequence[int], queries: int, dtype: torch.dtype
) -> PackedShares:
    """How `decode_packed` divides packed units among its programs.

    Args:
        lengths: packed units of each sequence.
        queries: of a KV head, G*T, and dtype: those of the steps to come. Others get what is right
            too, but not as soon.
    """
    device = packed.starts.device
    programs = _programs_if_small(packed, queries, dtype) or PROGRAMS
    shares = share_out(lengths, programs * multiprocessors(device), device, start=_PACKED_START)
    return PackedShares.along(packed.starts, shares)


def decode_packed_reference(
    query: Tensor, packed: PackedKV | RotatedKV, shares: PackedShares, plain: Plain, scaling: float
) -> Tensor:
    lengths = (shares.lengths, plain.shares.lengths)
    pairs = zip(packed.expanded(query.shape[3]), plain[:2], strict=True)
    keys, values = (_interleaved(x.to(query.dtype), rest, *lengths) for x, rest in pairs)
    both = tuple(map(sum, zip(*lengths, strict=True)))
    whole = plain._replace(keys=keys, values=values, shares=replace(plain.shares, lengths=both))
    return decode_sequences_reference(query, whole, scaling)


def _interleaved(
    first: Tensor, second: Tensor, lengths: Sequence[int], others: Sequence[int]
) -> Tensor:
    """Each sequence of `first` [N, D], of these lengths, followed by that of `second`."""
    pairs = zip(first.split([*lengths]), second.split([*others]), strict=True)
    return torch.cat([units for pair in pairs for units in pair])
