"""Attention of one or a few new tokens straight over packed keys and values.

As `decode_sequences`, with a context whose units are packed, all but the last of each sequence.
Packed units are expanded in registers or not at all: what is read of them is what they occupy.
Their tiles, those of the plain units and the tails leave their states in one buffer for one merge.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from locret.kernels.decode import (
    attend_sequences,
    check_sequences,
    decode_sequences_reference,
    tail_splits,
)
from locret.kernels.decode_kivi import PROGRAMS, attend_packed
from locret.kernels.decode_kivi_small import PROGRAMS as SMALL_PROGRAMS
from locret.kernels.decode_kivi_small import attend_small, takes_small
from locret.kernels.decode_rotated import PROGRAMS as ROTATED_PROGRAMS
from locret.kernels.decode_rotated import attend_rotated, merge_rotated
from locret.kernels.dispatch import multiprocessors, takes_triton
from locret.kernels.packed import PackedKV, PackedShares, check_packed, expand_units_reference
from locret.kernels.packed_rotated import RotatedKV, check_rotated, expand_rotated_reference
from locret.kernels.splits import Shares, States, share_out

_START = 64  # units in whose time a program begins and ends


def decode_packed(
    query: Tensor,
    packed: PackedKV | RotatedKV,
    shares: PackedShares,
    plain_keys: Tensor,
    plain_values: Tensor,
    plain_shares: Shares,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_length: Tensor,
    scaling: float,
) -> Tensor:
    """softmax(scaling q k) v over each sequence's packed units, its plain ones and its tail.

    The T tokens are the last of the tail's filled slots, causal: token t sees the slots below
    tail_length - (T - 1 - t) and all that comes before the tail.

    Args:
        query: [B, H*G, T, D], rotated; G*T at most 128.
        packed: N units, keys rotated, of the B*H sequences one after the other; any of them may be
            empty.
        shares: of their lengths, as `packed_shares` gives them.
        plain_keys, plain_values, plain_shares: units that are not packed, and the tails: as of
        tail_keys, tail_values, tail_length:    `decode_sequences`.
        scaling: factor of the logits.

    Returns:
        [B, H*G, T, D] in query's dtype; zeros where a token sees nothing.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    rest = (plain_keys, plain_values, plain_shares, tail_keys, tail_values, tail_length)
    check_sequences(query, *rest)
    _check(query, packed, shares, plain_shares)
    if not takes_triton(query, packed.starts, shares.tiles):
        return decode_packed_reference(query, packed, shares, *rest, scaling)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    heads = tail_keys.shape[1]
    splits = tail_splits(plain_shares, tail_keys)
    states = States.empty(query, heads, shares.count + plain_shares.count, splits)
    if not shares.count:
        pass
    elif isinstance(packed, RotatedKV):
        attend_rotated(query, packed, shares, scaling, heads, states)
    elif takes_small(states.weights.shape[1], query.dtype, packed):
        attend_small(query, packed, shares, scaling, heads, states)
    else:
        attend_packed(query, packed, shares, scaling, heads, states)
    attend_sequences(query, *rest, scaling, states, shares.count)
    if shares.count and isinstance(packed, RotatedKV):
        merge_rotated(states, out, shares, plain_shares)
    else:
        states.merge(out, [shares, plain_shares])
    return out


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
    if isinstance(packed, RotatedKV):
        programs = ROTATED_PROGRAMS
    else:
        programs = SMALL_PROGRAMS if takes_small(queries, dtype, packed) else PROGRAMS
    shares = share_out(lengths, programs * multiprocessors(device), device, start=_START)
    return PackedShares.along(packed.starts, shares)


def decode_packed_reference(
    query: Tensor,
    packed: PackedKV | RotatedKV,
    shares: PackedShares,
    plain_keys: Tensor,
    plain_values: Tensor,
    plain_shares: Shares,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_length: Tensor,
    scaling: float,
) -> Tensor:
    """The twin of `decode_packed`, in plain PyTorch."""
    keys, values = expand_reference(packed)
    lengths = (shares.lengths, plain_shares.lengths)
    keys = _interleaved(keys.to(query.dtype), plain_keys, *lengths)
    values = _interleaved(values.to(query.dtype), plain_values, *lengths)
    both = share_out([sum(pair) for pair in zip(*lengths, strict=True)], 1, query.device)
    tails = (tail_keys, tail_values, tail_length)
    return decode_sequences_reference(query, keys, values, both, *tails, scaling)


def expand_reference(packed: PackedKV | RotatedKV) -> tuple[Tensor, Tensor]:
    """Keys and values float32 [N, D] of packed units, in plain PyTorch."""
    if isinstance(packed, RotatedKV):
        size = packed.keys[2].shape[1]
        return (
            expand_rotated_reference(packed.keys, packed.key_levels, size, packed.starts),
            expand_rotated_reference(packed.values, packed.value_levels, size),
        )
    how = (packed.bits, packed.group, packed.keys[1].shape[1])
    return (
        expand_units_reference(packed.keys, *how, packed.starts),
        expand_units_reference(packed.values, *how),
    )


def _interleaved(
    first: Tensor, second: Tensor, lengths: Sequence[int], others: Sequence[int]
) -> Tensor:
    """Each sequence of `first` [N, D], of these lengths, followed by that of `second`."""
    pairs = zip(first.split([*lengths]), second.split([*others]), strict=True)
    return torch.cat([units for pair in pairs for units in pair])


def _check(
    query: Tensor, packed: PackedKV | RotatedKV, shares: PackedShares, plain_shares: Shares
) -> None:
    shape = (shares.units, query.shape[3])
    if isinstance(packed, RotatedKV):
        check_rotated(packed.keys, packed.key_levels, shape, packed.starts, "key_")
        check_rotated(packed.values, packed.value_levels, shape, None, "value_")
    else:
        check_packed(packed.keys, packed.bits, packed.group, shape, packed.starts, "key_")
        check_packed(packed.values, packed.bits, packed.group, shape, None, "value_")
    if len(shares.lengths) != len(plain_shares.lengths):
        raise ValueError(
            f"shares are of {len(shares.lengths)} sequences and of {len(plain_shares.lengths)} "
            "sequences' plain units; expected as many"
        )
