"""What a policy is: a rule that says which cache units to keep. One method makes a policy.

B batch, H KV heads, G query heads a KV head, S units held, T new tokens, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeldUnits:
    """The units that a layer held before the chunk came.

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
        held: the units held before; None = none.
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
    held: HeldUnits | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    drop: int = 0
    empty: Tensor | None = None
    padding: Tensor | None = None
    rotate: Callable[[Tensor, int], Tensor] = _cannot_rotate

    @property
    def num_held(self) -> int:
        """S, units held before."""
        return 0 if self.held is None else self.held.keys.shape[2]

    @property
    def own_positions(self) -> Tensor:
        """Positions of the new tokens counted from each row's own first token, [1 or B, T] long."""
        padding = 0 if self.padding is None else self.padding[:, None]
        return self.positions[None] - padding

    @property
    def positions(self) -> Tensor:
        """Source positions of the new tokens, [T] long."""
        return torch.arange(self.start, self.start + self.key.shape[2], device=self.key.device)

    def all_keys(self) -> Tensor:
        """Rotated keys of held and new units, [B, H, S + T, D]."""
        if self.held is None:
            return self.rotated_key
        return torch.cat([self.held.keys, self.rotated_key], dim=2)

    def all_values(self) -> Tensor:
        """Values of held and new units, [B, H, S + T, D]."""
        return self.value if self.held is None else torch.cat([self.held.values, self.value], dim=2)

    def all_positions(self) -> Tensor:
        """Source positions of held and new units, [B, H, S + T] long."""
        new = self.positions.expand(self.key.shape[:3])
        return new if self.held is None else torch.cat([self.held.positions, new], dim=2)

    def filled(self) -> Tensor | None:
        """Which slots hold a unit, bool [B, H, S + T]; None = all."""
        if self.empty is None:
            return None
        slot = torch.arange(self.num_held + self.key.shape[2], device=self.key.device)
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
        `chunk.held.scores` of the next chunk.
        """
        new = self.score(chunk)
        expected = tuple(chunk.key.shape[:3])
        if tuple(new.shape) != expected:
            raise ValueError(
                f"policy {type(self).__name__} returned scores of shape {tuple(new.shape)}; "
                f"expected [batch, KV heads, new tokens], {expected}"
            )
        if chunk.held is None:
            return new.float()
        return torch.cat([chunk.held.scores, new.float()], dim=2)

    def reconsider(self, scores: list[Tensor], surprisal: Callable[[], Tensor]) -> list[Tensor]:
        """Scores after a chunk has gone through all layers, for policies that wait.

        Args:
            scores: of every layer, [B, H, S + T] float32, as `rank` returned them.
            surprisal: computes how surprised the model was at each of the T new tokens,
                -log p(token | what it held), [B, T] float32; +inf for a request's first token.
                Costs the language-model head on T tokens, in blocks.

        Returns:
            Finite scores of the same shapes; they become `chunk.held.scores` of the next chunk.
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
