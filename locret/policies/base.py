"""What a policy is: a rule that says which cache units to keep. One method makes a policy.

`LayerChunk` is what it sees, `attention_weights` and `attention_received` what several policies
look at, `keep_highest` and `keep_counts` how the units with the highest scores are chosen (paper,
section 3.3: after a chunk every KV head keeps its highest scores; the last units, the stabilizers,
are kept whatever they scored; kept units stay in order).

B batch, H KV heads, G query heads a KV head, S units held, T new tokens, W queries, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from locret.cache.merging import Merging
from locret.kernels import threshold_select

HIGHEST = torch.finfo(torch.float32).max
"""The score of units to be kept in any case: finite, so that stabilizers rank higher."""


@dataclass(frozen=True)
class Context:
    """The units that a layer holds when a chunk comes.

    Attributes:
        keys: [B, H, S, D], rotated at their slots.
        values: [B, H, S, D].
        scores: [B, H, S] float32, as the policy left them; higher = keep.
        positions: [B, H, S] long, source positions.
    """

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor


def _cannot_rotate(x: Tensor, offset: int) -> Tensor:
    raise ValueError("this chunk came without a rotation; the engine gives one")


@dataclass(frozen=True)
class LayerChunk:
    """What a policy sees of one chunk in one layer.

    Attributes:
        layer_idx: the layer, counted among those that a budget holds for: layers with a sliding
            window bound their cache by themselves.
        query: [B, H*G, T, D], before RoPE.
        key, value: [B, H, T, D], the new units', before RoPE.
        hidden: [B, T, hidden size], the attention layer's input.
        start: source position of the first new token; the others follow.
        scaling: the layer's softmax scale.
        rotated_query, rotated_key: `query` and `key` rotated at their slots.
        context: the units held before; None = none.
        state: what the policy remembers of this layer and request, by name; [B, ...] tensors whose
            shape does not depend on the tokens read, zeros = nothing. The only place for it: a
            policy object serves many requests.
        drop: how many of the last new tokens are given up after this chunk, a question that will be
            asked later: scores may tell of them, `state` may not.
        empty: [B, H] long: leading slots of a row and head that hold nothing; None = all hold
            something. They are never kept while there is something to keep; only policies that
            relate units to each other need to look.
        padding: [B] long: how many tokens before a row's own first one are padding; None = none.
        rotate: `rotate(x, offset)` is x [B, any heads, n, D] rotated at the n slots that begin
            `offset` slots after the first new unit's.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    start: int
    scaling: float
    rotated_query: Tensor
    rotated_key: Tensor
    context: Context | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    drop: int = 0
    empty: Tensor | None = None
    padding: Tensor | None = None
    rotate: Callable[[Tensor, int], Tensor] = _cannot_rotate

    @property
    def context_length(self) -> int:
        """S, units held before."""
        return 0 if self.context is None else self.context.keys.shape[2]

    @property
    def own_positions(self) -> Tensor:
        """Positions of the new tokens counted from each row's own first token, [1 or B, T] long."""
        positions = self.positions[None]
        return positions if self.padding is None else positions - self.padding[:, None]

    @property
    def positions(self) -> Tensor:
        """Source positions of the new tokens, [T] long."""
        return torch.arange(self.start, self.start + self.key.shape[2], device=self.key.device)

    def among_first(self, count: int) -> Tensor:
        """Which new units are among the first `count` tokens of their row, bool [B, H, T]."""
        return (self.own_positions < count)[:, None].expand(self.key.shape[:3])

    def all_keys(self) -> Tensor:
        """Rotated keys of held and new units, [B, H, S + T, D]."""
        if self.context is None:
            return self.rotated_key
        return torch.cat([self.context.keys, self.rotated_key], dim=2)

    def all_values(self) -> Tensor:
        """Values of held and new units, [B, H, S + T, D]."""
        return (
            self.value
            if self.context is None
            else torch.cat([self.context.values, self.value], dim=2)
        )

    def filled(self) -> Tensor | None:
        """Which slots hold a unit, bool [B, H, S + T]; None = all."""
        if self.empty is None:
            return None
        slot = torch.arange(self.context_length + self.key.shape[2], device=self.key.device)
        return slot >= self.empty[..., None]


class Policy:
    """Ranks units. Subclasses implement `score` (most need nothing else) or `rank`.

    A policy that must know more than one layer sets `waits` and implements `reconsider`.
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    """False: the policy keeps every unit, and a budget has no effect."""
    waits: ClassVar[bool] = False
    """True: layers evict only when the chunk has gone through all of them, by the scores that
    `reconsider` returns. Then every layer holds its budget and the whole chunk for a moment."""

    def score(self, chunk: LayerChunk) -> Tensor:
        """Finite scores [B, H, T] of the chunk's units, given once; higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must implement score()")

    def rank(self, chunk: LayerChunk) -> Tensor:
        """Finite scores [B, H, S + T] of held and new units, after every chunk; higher = keep.

        Policies whose scores of old units change override it; what it returns becomes
        `chunk.context.scores` of the next chunk.
        """
        new = self.score(chunk)
        expected = tuple(chunk.key.shape[:3])
        if tuple(new.shape) != expected:
            raise ValueError(
                f"policy {type(self).__name__} returned scores of shape {tuple(new.shape)}; "
                f"expected [batch, KV heads, new tokens], {expected}"
            )
        if chunk.context is None:
            return new.float()
        return torch.cat([chunk.context.scores, new.float()], dim=2)

    def reconsider(self, scores: list[Tensor], surprisal: Callable[[], Tensor]) -> list[Tensor]:
        """Scores after a chunk has gone through all layers, for policies that wait.

        Args:
            scores: of every layer, [B, H, S + T] float32, as `rank` returned them.
            surprisal: computes how surprised the model was at each of the T new tokens,
                -log p(token | what it held), [B, T] float32; +inf for a request's first token.
                Costs the language-model head on T tokens, in blocks.

        Returns:
            Finite scores of the same shapes; they become `chunk.context.scores` of the next chunk.
        """
        raise NotImplementedError(f"{type(self).__name__} waits and must implement reconsider()")

    def allot(self, scores: list[Tensor], budgets: list[int]) -> list[Tensor] | None:
        """How many units each head keeps, where heads or layers share what they have.

        Args:
            scores: [B, H, S] float32 of one layer, or of every layer if the policy waits; +inf =
                kept in any case, -inf = an empty slot.
            budgets: of the same layers.

        Returns:
            Long [B, H] for each layer; in each row together no more than H x the sum of budgets,
            and in each head at least as many as are kept in any case. A head that holds fewer keeps
            them all. None = every head keeps its layer's budget.
        """
        return None

    @property
    def core(self) -> "Policy":
        """The policy that scores: this one, or what it is composed over."""
        return self

    def recent(self, budget: int) -> int:
        """How many of the last units a layer with this budget keeps whatever they scored, also at
        the final eviction. They count towards the budget."""
        return 0

    def budgets(self, budget: int, num_layers: int, context: int) -> Sequence[int]:
        """How many units of `context` tokens each layer that is not bounded by a window keeps,
        `budget` on average."""
        return [budget] * num_layers


def attention_weights(
    query: Tensor, keys: Tensor, first: int, scaling: float, filled: Tensor | None
) -> Tensor:
    """Softmax over the slots that each query sees; zeros for a query whose own slot is empty.

    Args:
        query: [B, H*G, W, D], rotated, at the slots first .. first + W - 1.
        keys: [B, H, S, D], rotated.
        filled: bool [B, H, S], slots that hold a unit; None = all.

    Returns:
        [B, H, G, W, S] float32.
    """
    batch, heads, slots, size = keys.shape
    grouped = query.reshape(batch, heads, -1, query.shape[2], size)
    logits = torch.matmul(grouped, keys[:, :, None].transpose(-1, -2)).float() * scaling
    slot = torch.arange(slots, device=keys.device)
    own = torch.arange(first, first + query.shape[2], device=keys.device)
    hidden = slot > own[:, None]
    if filled is None:
        return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    # A query without a unit of its own is padding: it sees nothing, and softmax makes NaN of that.
    seen = filled[:, :, None] & ~hidden & filled[:, :, first : first + query.shape[2], None]
    return logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def attention_received(chunk: LayerChunk, block: int) -> Tensor:
    """Attention mass that held and new units receive from the chunk's queries, [B, H, S + T]
    float32: summed over queries, averaged over the query heads of a group.

    `block` queries are computed at a time, so that no T x S matrix is kept.
    """
    keys, filled, before = chunk.all_keys(), chunk.filled(), chunk.context_length
    mass = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    for start in range(0, chunk.rotated_query.shape[2], block):
        query = chunk.rotated_query[:, :, start : start + block]
        weights = attention_weights(query, keys, before + start, chunk.scaling, filled)
        mass += weights.sum(dim=3).mean(dim=2)
    return mass


@dataclass(frozen=True)
class Eviction:
    """What layers do after attending: keep `budgets[layer]` units.

    The last `stabilizers` units and the first `query` ones are among them whatever they scored.
    A layer evicts when it holds more than `above` units above its budget. The last `drop` tokens
    of the chunk are read for the policy to see and not kept: a question that will be asked later.
    The values of evicted units are merged into others by the rule `merging`; None = they are lost.
    """

    budgets: tuple[int, ...]
    stabilizers: int
    query: int = 0
    above: int = 0
    drop: int = 0
    merging: Merging | None = None

    def most(self, retained_idx: int, after_eviction: int) -> int:
        """Units that a layer, which held so many after its last eviction, may hold."""
        return max(self.budgets[retained_idx], after_eviction) + self.above

    def protected(self, retained_idx: int, recent: int = 0) -> tuple[int, int]:
        """Protected units at the (tail, head) of a layer, the policy's `recent` ones included: a
        small budget protects fewer."""
        budget = self.budgets[retained_idx]
        head = min(self.query, budget)
        return min(max(self.stabilizers, recent - self.drop), budget - head), head


class Kept(NamedTuple):
    """Indices [B, H, K] long, ascending; how many leading ones of a head are mere fillers, [B, H]
    long; None = those that were empty before, as far as they are still there."""

    units: Tensor
    fillers: Tensor | None


def keep_highest(
    scores: Tensor,
    budget: int,
    protected_tail: int = 0,
    protected_head: int = 0,
    empty: Tensor | None = None,
) -> Tensor:
    """Indices of the units to keep, ascending in each head.

    Args:
        scores: [B, H, S]; higher = keep. Of equal scores, and equal tokens score alike in the first
            layer, those stay that `torch.topk` chooses, as in the released code; on a GPU, where
            its choice changes from call to call, the earliest.
        budget: units a head keeps, at least as many as are protected.
        protected_tail: how many of the last units are kept whatever they scored; they count
            towards the budget.
        protected_head: likewise, of the first units.
        empty: [B, H] long: leading slots that hold nothing; None = none.

    Returns:
        Long [B, H, min(budget, S)].
    """
    assert min(protected_head, protected_tail) >= 0, (protected_head, protected_tail)
    assert protected_head + protected_tail <= budget, (protected_head, protected_tail, budget)
    if empty is not None:
        return keep_highest(with_protected(scores, protected_tail, protected_head, empty), budget)
    size = scores.shape[-1]
    if size <= budget:
        return torch.arange(size, device=scores.device).expand(scores.shape)
    if scores.is_cuda:
        return threshold_select(scores, budget, protected_tail, protected_head)
    if protected_head or protected_tail:
        scores = with_protected(scores, protected_tail, protected_head)
    return scores.topk(budget, dim=-1, sorted=False).indices.sort(dim=-1).values


def keep_counts(scores: Tensor, counts: Tensor) -> Kept:
    """Each head's `counts` highest scores, where heads keep different numbers.

    Args:
        scores: [B, H, S]; higher = keep.
        counts: long [B, H], at most S.

    Returns:
        Indices aligned at the end, K the largest count.
    """
    size, most = scores.shape[-1], int(counts.max())
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept.scatter_(-1, order, torch.arange(size, device=scores.device) < counts[..., None])
    slot = torch.arange(size, device=scores.device).expand(scores.shape)
    aligned = slot.masked_fill(~kept, -1).sort(dim=-1).values[..., size - most :]
    return Kept(aligned.clamp(min=0), most - counts)


def with_protected(
    scores: Tensor, protected_tail: int, protected_head: int, empty: Tensor | None = None
) -> Tensor:
    """Scores [B, H, S] that are +inf for the last and first units.

    `empty` [B, H] says how many leading slots hold nothing: those are -inf, and the first units
    come behind them; None = none.
    """
    scores = scores.clone()
    size = scores.shape[-1]
    scores[..., size - protected_tail :] = torch.inf
    if empty is None:
        scores[..., :protected_head] = torch.inf
        return scores
    slot = torch.arange(size, device=scores.device)
    scores = scores.masked_fill(slot < (empty + protected_head)[..., None], torch.inf)
    return scores.masked_fill(slot < empty[..., None], -torch.inf)
