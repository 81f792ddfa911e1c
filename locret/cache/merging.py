"""Value merging: what is evicted goes on in the values of units that stay. Pure functions.

Eviction loses a value for good. Here each evicted unit is matched with one unit that stays in the
same head, and if their keys are alike enough its value goes into that unit's mean: queries that
would have looked at it look at the like key and find some of it there. Nothing is trained and the
cache keeps its size.

Where the rule comes from:
  receiver   the unit that stays whose key has the highest cosine, as in D2O (arXiv 2406.13035)
             and token merging (ToMe, arXiv 2210.09461); or the one in the nearest slot, much like
             CaM (ICML 2024, PMLR 235:58840), whose evicted values go to units that follow.
  threshold  D2O merges what is at least as alike as the evicted units are on average and drops the
             rest, so that values do not drown in unrelated ones.
  weights    a unit that stands for n tokens weighs n (ToMe's token sizes), so that a value is the
             plain mean of all tokens it stands for, however often there was an eviction.
  keys       stay as they are (CaM): slot, source position and score still belong to them. D2O and
             KVMerger (arXiv 2407.08454) average keys too; the mean of keys rotated at different
             positions is rotated at none.
  folding    with `fold`, an evicted unit j weighs exp(s_j - s_i) as much as its receiver i, by the
             scores s, and the logits of i rise by the logarithm of its weight (ToMe's log n), so
             that i draws the attention all its tokens would have drawn (`locret.model.attend`).
Not taken over: CaM's sampling by attention, which fused attention does not give away. LoCoCo (arXiv
2406.05317) fuses by trained convolutions.

First tokens draw attention that is not meant for their values (arXiv 2309.17453), so that what goes
into them would be seen by every query: they receive nothing, nor does a question that was read in
front. Recent units and stabilizers receive like all others, as in CaM and D2O.

Shapes: B batch, H KV heads, S units before, K units that stay, E evicted units, D head size.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from locret.quantities import check_whole

Receiver = Literal["similar", "adjacent"]

BLOCK = 256  # evicted units whose similarities to all that stay are in memory at a time
ROUNDING = 1e-6  # so that units that are all alike reach their mean


@dataclass(frozen=True)
class Merging:
    """How evicted values are merged.

    Cost at an eviction, for a layer at a time: held and new units side by side once more, and with
    "similar" a product of evicted and kept keys, about as much as attention logits of one head for
    each KV head; with "adjacent" a binary search. Four bytes a unit and KV head.

    Args:
        into: "similar": the unit with the most similar key; "adjacent": the one in the nearest
            slot, of two the later.
        threshold: least cosine of the two keys, -1 to 1; "mean": that of the head's evicted units
            on average, at each eviction; None: whatever is evicted is merged. Keys are compared as
            they are held: before RoPE at compact positions, after it at original ones.
        sinks: so many first tokens receive nothing.
        fold: units count in attention for what was merged into them. Scores should be logarithms of
            attention. Cost: keys and values of the context are copied for every chunk and step, a
            layer at a time, and steps of an answer come from no CUDA graph.
    """

    into: Receiver = "similar"
    threshold: float | Literal["mean"] | None = "mean"
    sinks: int = 4
    fold: bool = False

    def __post_init__(self) -> None:
        if self.into not in get_args(Receiver):
            raise ValueError(f"merging into {self.into!r}; expected one of {get_args(Receiver)}")
        bound = self.threshold
        number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
        if bound not in (None, "mean") and not (number and -1 <= float(bound) <= 1):
            raise ValueError(
                f"merging threshold is {bound!r}; expected a cosine from -1 to 1, 'mean' or None"
            )
        check_whole("merging sinks", self.sinks, 0)
        if not isinstance(self.fold, bool):
            raise ValueError(f"merging fold is {self.fold!r}; expected True or False")


MergingChoice = Merging | str | Mapping[str, Any] | None
"""How a user names it: "similar" or "adjacent"; a mapping of options, {"into": "similar",
"threshold": 0.8}; a `Merging`; None = evicted values are lost."""


def merging_of(given: MergingChoice) -> Merging | None:
    """The merging that a user means. ValueError: an unknown option, or a value that an option does
    not take."""
    if given is None or isinstance(given, Merging):
        return given
    if isinstance(given, str):
        return Merging(into=given)  # type: ignore[arg-type]
    known = [field.name for field in fields(Merging)]
    if not isinstance(given, Mapping) or set(given) - set(known):
        raise ValueError(
            f"merging is {given!r}; expected 'similar', 'adjacent' or a mapping of some of "
            f"{', '.join(known)}"
        )
    return Merging(**given)


def describe_merging(merging: Merging | None) -> dict[str, Any] | None:
    """Its options, `fold` where it is on; `merging_of` makes it again."""
    options = {} if merging is None else asdict(merging)
    return {k: v for k, v in options.items() if k != "fold" or v} or None


class Mergeable(NamedTuple):
    """All units of a layer before an eviction: keys and values [B, H, S, D], source positions
    [B, H, S] long, ascending, weights [B, H, S] float32: tokens that a unit stands for, and if they
    fold, scores [B, H, S] float32, higher = keep."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    weights: Tensor
    scores: Tensor | None = None


class Merged(NamedTuple):
    """Values [B, H, K, D] and weights [B, H, K] float32 of the units that stay."""

    values: Tensor
    weights: Tensor


def merge_evicted(
    units: Mergeable,
    index: Tensor,
    merging: Merging,
    *,
    empty: Tensor | None = None,
    fillers: Tensor | None = None,
    query: int = 0,
) -> Merged:
    """Values and weights of the units that stay, evicted ones merged in.

    Args:
        units: before the eviction.
        index: [B, H, K] long, ascending: those that stay.
        merging: the rule.
        empty: [B, H] long: leading slots of `units` that hold nothing; None = none.
        fillers: [B, H] long: leading entries of `index` that stand for nothing; None = none.
            Fillers neither give nor receive, and weigh nothing.
        query: first tokens that receive nothing, beside the sinks: a question read in front.

    Returns:
        Values in their dtype; units that received nothing keep theirs bit for bit. Where several
        are merged into one on a GPU, the order of summing is not fixed.
    """
    stays = _from(fillers, index)
    uneven = empty is not None or fillers is not None
    gone = _gone(units.weights, index, stays, empty, uneven)
    values, weights = _at(units.values, index), _at(units.weights, index).where(stays, 0.0)
    if not gone.shape[2]:
        return Merged(values, weights)
    is_gone = gone < units.weights.shape[2]
    gone = gone.clamp(max=units.weights.shape[2] - 1)
    receives = stays & (_at(units.positions, index) >= max(merging.sinks, query))
    match = _most_similar if merging.into == "similar" else _nearest
    alike, receiver = match(units, index, receives, gone)
    given = is_gone & (alike > -torch.inf)
    given &= alike >= _least(alike, given, merging.threshold)

    share = _at(units.weights, gone).where(given, 0.0)
    if merging.fold:
        assert units.scores is not None
        above = _at(units.scores, gone) - _at(units.scores, index).gather(2, receiver)
        # Nothing counts for more tokens than it stands for, though protected units score less.
        share = share * above.clamp(max=0).exp()
    total = weights.scatter_add(2, receiver, share)
    added = _at(units.values, gone).float() * share[..., None]
    sums = (values.float() * weights[..., None]).scatter_add(2, _wide(receiver, added), added)
    mean = (sums / total.clamp(min=1)[..., None]).to(values.dtype)
    return Merged(mean.where((total > weights)[..., None], values), total)


def _from(first: Tensor | None, like: Tensor) -> Tensor:
    """Which entries of `like` [B, H, n] are not before `first` [B, H], bool [B, H, n]."""
    entry = torch.arange(like.shape[2], device=like.device).expand(like.shape)
    return torch.ones_like(entry, dtype=torch.bool) if first is None else entry >= first[..., None]


def _gone(like: Tensor, index: Tensor, stays: Tensor, empty: Tensor | None, uneven: bool) -> Tensor:
    """Evicted slots [B, H, E] long, ascending; S where a head has fewer of them than others, which
    is the case only where heads are `uneven`."""
    size = like.shape[2]
    taken = torch.zeros(*like.shape[:2], size + 1, dtype=torch.bool, device=like.device)
    taken.scatter_(2, index.where(stays, size), True)
    gone = ~taken[..., :size] & _from(empty, like)
    most = int(gone.sum(dim=-1).max()) if uneven else size - index.shape[2]
    slot = torch.arange(size, device=like.device)
    return slot.where(gone, size).sort(dim=-1).values[..., :most]


def _most_similar(
    units: Mergeable, index: Tensor, receives: Tensor, gone: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosine [B, H, E] of each evicted key and the most similar that may receive, -inf where none
    may, and which of the K that is, long [B, H, E]."""
    keys = normalize(_at(units.keys, index).float(), dim=-1).transpose(-1, -2)
    blocks = [
        (normalize(_at(units.keys, block).float(), dim=-1) @ keys)
        .masked_fill(~receives[:, :, None], -torch.inf)
        .max(dim=-1)
        for block in gone.split(BLOCK, dim=2)
    ]
    return torch.cat([b.values for b in blocks], 2), torch.cat([b.indices for b in blocks], 2)


def _nearest(
    units: Mergeable, index: Tensor, receives: Tensor, gone: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for the receiver whose slot is nearest."""
    # Those that may not receive are the first of all, so that this leaves the order as it is.
    there, here = index.where(receives, -1), gone
    found = torch.searchsorted(there, here)
    before, after = (found - 1).clamp(min=0), found.clamp(max=index.shape[2] - 1)
    nearer = (here - there.gather(2, before)).abs() < (there.gather(2, after) - here).abs()
    receiver = before.where(nearer & receives.gather(2, before), after)
    alike = torch.cosine_similarity(
        _at(units.keys, gone).float(), _at(units.keys, index.gather(2, receiver)).float(), dim=-1
    )
    return alike.where(receives.gather(2, receiver), -torch.inf), receiver


def _least(alike: Tensor, given: Tensor, threshold: float | str | None) -> Tensor | float:
    """The cosine that is asked for, [B, H, 1] where it is a mean."""
    if isinstance(threshold, str):
        count = given.sum(dim=-1, keepdim=True).clamp(min=1)
        return alike.where(given, 0.0).sum(dim=-1, keepdim=True) / count - ROUNDING
    return -torch.inf if threshold is None else threshold - ROUNDING


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index if x.dim() == 3 else _wide(index, x))


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(*index.shape, like.shape[-1])
