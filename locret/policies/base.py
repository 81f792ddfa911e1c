"""What a policy is: a rule that says which cache units to keep. One method makes a policy.

`LayerChunk` is what it sees, `LocretPolicy` the simplest and the paper's, `Eviction` how many units
stay, `highest_of_all` what stays where heads or layers share what they have. How the
units with the highest scores are chosen: `locret.kernels.select_sequences` (paper, section 3.3:
after a chunk every KV head keeps its highest scores; the last units, the stabilizers, are kept
whatever they scored; kept units stay in order).

B batch, H KV heads, G query heads a KV head, S units held, T new tokens, W queries, D head size.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from locret.cache.merging import Merging
from locret.heads.heads import FEATURES, RetainingHeads
from locret.heads.targets import AnswerView

HIGHEST = torch.finfo(torch.float32).max
"""The score of units to be kept in any case: finite, so that stabilizers rank higher."""


class Context:
    """The units that a layer holds when a chunk comes, as rectangles: filled up in front where
    heads or rows hold fewer than others (`LayerChunk.empty`). Each is made when a policy first asks
    for it, so that policies that score units once cost nothing.

    Args:
        length: S.
        make: given a name, the tensor.

    Attributes:
        keys: [B, H, S, D], rotated at their slots.
        values: [B, H, S, D].
        scores: [B, H, S] float32, as the policy left them; higher = keep.
        positions: [B, H, S] long, source positions.
    """

    def __init__(self, length: int, make: Callable[[str], Tensor]) -> None:
        self.length = length
        self._make = make

    @functools.cached_property
    def keys(self) -> Tensor:
        return self._make("keys")

    @functools.cached_property
    def values(self) -> Tensor:
        return self._make("values")

    @functools.cached_property
    def scores(self) -> Tensor:
        return self._make("scores")

    @functools.cached_property
    def positions(self) -> Tensor:
        return self._make("source_positions").long()


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
        return 0 if self.context is None else self.context.length

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
        if self.context is None:
            return self.value
        return torch.cat([self.context.values, self.value], dim=2)

    def filled(self) -> Tensor | None:
        """Which slots hold a unit, bool [B, H, S + T]; None = all."""
        if self.empty is None:
            return None
        slot = torch.arange(self.context_length + self.key.shape[2], device=self.key.device)
        return slot >= self.empty[..., None]


class Policy:
    """Ranks units. Subclasses implement `score` (most need nothing else) or `rank`.

    A policy that must know more than one layer sets `waits` and implements `reconsider`; one that
    scores a context by reading it again sets `rereads`, and implements `second_readings` and `look`
    instead of `score`.
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    """False: the policy keeps every unit, and a budget has no effect."""
    waits: ClassVar[bool] = False
    """True: layers evict only when the chunk has gone through all of them, by the scores that
    `reconsider` returns. Then every layer holds its budget and the whole chunk for a moment."""
    rereads: ClassVar[bool] = False
    """True: nothing is scored or evicted before the whole context was read, and read again, so that
    the budget does not bound what is held until then."""

    @classmethod
    def words(cls, tokenizer: Any, chat: bool = True) -> dict[str, Any]:
        """Arguments of the policy that are tokens, and so depend on the model's tokenizer; the
        context stands in a user's turn of its template, if it has one and this is a `chat`."""
        return {}

    @property
    def ranks_anew(self) -> bool:
        """Whether scores of old units change: whether `rank` is the policy's own."""
        return type(self).rank is not Policy.rank

    def score(self, chunk: LayerChunk) -> Tensor:
        """Finite scores [B, H, T] of the chunk's units, given once; higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must implement score()")

    def rank(self, chunk: LayerChunk) -> Tensor:
        """Finite scores [B, H, S + T] of held and new units, after every chunk; higher = keep.

        Policies whose scores of old units change override it; what it returns becomes
        `chunk.context.scores` of the next chunk.
        """
        new = self.score_new(chunk)
        return new if chunk.context is None else torch.cat([chunk.context.scores, new], dim=2)

    def score_new(self, chunk: LayerChunk) -> Tensor:
        """What `score` says, float32, if it fits the chunk. ValueError: it is of another shape."""
        new = self.score(chunk)
        expected = tuple(chunk.key.shape[:3])
        if tuple(new.shape) != expected:
            raise ValueError(
                f"policy {type(self).__name__} returned scores of shape {tuple(new.shape)}; "
                f"expected [batch, KV heads, new tokens], {expected}"
            )
        # Heads score token by token, and what chooses reads unit by unit: one copy does both.
        return new.to(torch.float32, memory_format=torch.contiguous_format)

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

    def second_readings(self, context: Tensor) -> Iterator[tuple[Tensor, int]]:
        """What is read behind a context, for policies that reread: one reading after the other, of
        which none sees another, and none is kept.

        Args:
            context: [B, n] long.

        Returns:
            The tokens of each reading, [B, m] long, and how many of the last ones `look`.
        """
        raise NotImplementedError(f"{type(self).__name__} rereads; implement second_readings()")

    def look(self, view: AnswerView) -> Tensor:
        """Finite scores [B, H, P] of a layer's units by one second reading, float32, higher = keep;
        a unit's score is the highest of all readings. The last tokens of the reading are the view's
        answer; the context, and what else was read before these, its prompt."""
        raise NotImplementedError(f"{type(self).__name__} rereads and must implement look()")

    @property
    def shares(self) -> bool:
        """Whether heads or layers share what they have: whether `allot` is the policy's own."""
        return type(self).allot is not Policy.allot

    def allot(self, scores: list[Tensor], budgets: list[int]) -> list[Tensor] | None:
        """How many units each head keeps, where heads or layers share what they have.

        Args:
            scores: [B, H, S] float32 of one layer, or of every layer if the policy waits or
                rereads; +inf = kept in any case, -inf = an empty slot.
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


class LocretPolicy(Policy):
    """Scores are the retaining heads'. Cost: one small MLP a layer and token.

    Args:
        heads: the heads, on the backbone's device.
    """

    name = "locret"

    def __init__(self, heads: RetainingHeads) -> None:
        self.heads = heads

    def score(self, chunk: LayerChunk) -> Tensor:
        features = FEATURES[self.heads.config.tap]
        return self.heads.layers[chunk.layer_idx](features(chunk))


@dataclass(frozen=True)
class Eviction:
    """What layers do after attending: keep `counts[layer][head]` units.

    The last `stabilizers` units and the first `query` ones are among them whatever they scored; a
    head that keeps fewer than others has fewer stabilizers in proportion: than `average` units, or
    if that is None, than its layer's heads on average. A layer evicts when a
    head holds more than `above` units above what it keeps. The last `drop` tokens of the chunk are
    read for the policy to see and not kept: a question that will be asked later. The values of
    evicted units are merged into others by the rule `merging`; None = they are lost. Where the
    policy shares units out, no head gets more than `slots`, or its layer's budget if that is more;
    None = any number.
    """

    counts: tuple[tuple[int, ...], ...]
    stabilizers: int
    query: int = 0
    above: int = 0
    drop: int = 0
    merging: Merging | None = None
    average: int | None = None
    slots: int | None = None

    def budget(self, retained_idx: int) -> int:
        """Units a head of a layer keeps on average."""
        counts = self.counts[retained_idx]
        return sum(counts) // len(counts)

    def most(self, retained_idx: int, units: int) -> int:
        """Units that a head of a layer may get of what heads share, where it holds `units`."""
        slots = units if self.slots is None else max(self.slots, self.budget(retained_idx))
        return min(units, slots)

    def protected(self, retained_idx: int, policy: Policy) -> list[tuple[int, int]]:
        """Protected units at the (tail, head) of each sequence of a layer's KV heads, those that
        are recent to the policy included: a small budget protects fewer. Heads that share what they
        have protect alike."""
        own = self.budget(retained_idx)
        average = max(self.average or own, 1)
        counts = self.counts[retained_idx]
        protected = []
        for count in (own,) * len(counts) if policy.shares else counts:
            head = min(self.query, count)
            tail = max(self.stabilizers * count // average, policy.recent(count) - self.drop)
            protected.append((min(tail, count - head), head))
        return protected


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


def highest(scores: Tensor, count: Tensor) -> Tensor:
    """Which of `scores` [N, S] are among the `count` [N] highest of their row, bool [N, S]."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(scores.shape[-1], device=scores.device) < count[:, None]
    return torch.zeros_like(first).scatter_(-1, order, first)


def raised(scores: Tensor, safe: Tensor) -> Tensor:
    """Scores [B, H, S] that are +inf for each head's `safe` [B, H] highest."""
    among = highest(scores.flatten(0, 1), safe.flatten()).view_as(scores)
    return scores.masked_fill(among & (scores > -torch.inf), torch.inf)


def only_best(scores: Tensor, count: int) -> Tensor:
    """Scores [B, H, S] that are -inf, as of empty slots, but for each head's `count` highest."""
    if scores.shape[-1] <= count:
        return scores
    rows = scores.flatten(0, 1)
    best = highest(rows, torch.full_like(rows[:, 0], count, dtype=torch.long))
    return scores.masked_fill(~best.view_as(scores), -torch.inf)


def highest_of_all(scores: Sequence[Tensor], total: Tensor) -> list[Tensor]:
    """Which slots are among the `total` [B] highest of a row's layers, empty ones last: bool
    [B, H, S] for each of the layers' `scores`, which may be on several devices."""
    device = scores[0].device
    flat = torch.cat([layer.flatten(1).to(device) for layer in scores], dim=1)
    chosen = highest(flat, total).split([layer[0].numel() for layer in scores], dim=1)
    return [
        mine.view(layer.shape).to(layer.device) for mine, layer in zip(chosen, scores, strict=True)
    ]
