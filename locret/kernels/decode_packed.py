"""Attention of one or a few new tokens straight over packed keys and values.

As `decode_sequences`, with a context whose units are packed, all but the last of each sequence.
Packed units are expanded in registers or not at all: what is read of them is what they occupy.
Their tiles, those of the plain units and the tails leave their states in one buffer for one merge.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from locret.kernels.decode import Plain, attend_sequences, decode_sequences_reference
from locret.kernels.decode_kivi import attend_packed
from locret.kernels.decode_kivi_small import PROGRAMS as SMALL_PROGRAMS
from locret.kernels.decode_kivi_small import attend_small, takes_small
from locret.kernels.decode_rotated import attend_rotated, merge_rotated
from locret.kernels.decode_rotated_small import PROGRAMS as SMALL_ROTATED_PROGRAMS
from locret.kernels.decode_rotated_small import takes_small_rotated
from locret.kernels.dispatch import multiprocessors, takes_triton
from locret.kernels.packed import PROGRAMS, PackedKV, PackedShares
from locret.kernels.packed_rotated import RotatedKV
from locret.kernels.splits import share_out

_START = 64  # units in whose time a program begins and ends


def decode_packed(
    query: Tensor, packed: PackedKV | RotatedKV, shares: PackedShares, plain: Plain, scaling: float
) -> Tensor:
    """softmax(scaling q k) v over each sequence's packed units, its plain ones and its tail.

    Tokens are causal as of `decode_sequences`, and see all that comes before the tail.

    Args:
        query, plain, scaling: as of `decode_sequences`.
        packed: N units, keys rotated, of the B*H sequences one after the other; any of them may be
            empty.
        shares: of their lengths, as `packed_shares` gives them.

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
    if not shares.count:
        pass
    elif isinstance(packed, RotatedKV):
        attend_rotated(query, packed, shares, scaling, states)
    elif takes_small(states.weights.shape[1], query.dtype, packed):
        attend_small(query, packed, shares, scaling, states)
    else:
        attend_packed(query, packed, shares, scaling, states)
    attend_sequences(query, plain, scaling, states, shares.count)
    if shares.count and isinstance(packed, RotatedKV):
        merge_rotated(states, out, [shares, plain.shares])
    else:
        states.merge(out, [shares, plain.shares])
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
    programs = PROGRAMS
    if isinstance(packed, RotatedKV):
        if takes_small_rotated(queries, dtype, packed):
            programs = SMALL_ROTATED_PROGRAMS
    elif takes_small(queries, dtype, packed):
        programs = SMALL_PROGRAMS
    shares = share_out(lengths, programs * multiprocessors(device), device, start=_START)
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
