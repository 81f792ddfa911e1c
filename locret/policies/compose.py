"""Who gets how much of the total, over any policy's scores: heads, layers, or both.

Engine(model, AdaptiveHeads("snapkv"))
Engine(model, PyramidLayers(LocretPolicy(heads), beta=14))
Engine(model, AdaptiveHeads(SharedLayers("keydiff")))
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from locret import policies
from locret.heads.targets import AnswerView
from locret.policies.attention import pyramid
from locret.policies.base import LayerChunk, Policy, highest_of_all, raised
from locret.quantities import check_between, check_whole

CERTAIN = 1e30  # policies give such scores to units that they keep in any case


class Composed(Policy):
    """A policy that scores as another one does.

    Args:
        policy: a name of `POLICIES`, for those that need no arguments, or a `Policy`.

    Raises:
        ValueError: it is neither.
    """

    label = "composed"

    def __init__(self, policy: str | Policy) -> None:
        self.policy = _made(policy)
        self.name = f"{self.policy.name}+{self.label}"  # type: ignore[misc]
        self.evicts = self.policy.evicts  # type: ignore[misc]
        self.waits = self.policy.waits  # type: ignore[misc]
        self.rereads = self.policy.rereads  # type: ignore[misc]

    @property
    def core(self) -> Policy:
        return self.policy.core

    @property
    def ranks_anew(self) -> bool:
        return self.policy.ranks_anew

    def score(self, chunk: LayerChunk) -> Tensor:
        return self.policy.score(chunk)

    def rank(self, chunk: LayerChunk) -> Tensor:
        return self.policy.rank(chunk)

    def reconsider(self, scores: list[Tensor], surprisal: Callable[[], Tensor]) -> list[Tensor]:
        return self.policy.reconsider(scores, surprisal) if self.policy.waits else scores

    def second_readings(self, context: Tensor) -> Iterator[tuple[Tensor, int]]:
        return self.policy.second_readings(context)

    def look(self, view: AnswerView) -> Tensor:
        return self.policy.look(view)

    @property
    def shares(self) -> bool:
        return type(self).allot is not Composed.allot or self.policy.shares

    def allot(self, scores: list[Tensor], budgets: list[int]) -> list[Tensor] | None:
        return self.policy.allot(scores, budgets)

    def recent(self, budget: int) -> int:
        return self.policy.recent(budget)

    def budgets(self, budget: int, num_layers: int, context: int) -> Sequence[int]:
        return self.policy.budgets(budget, num_layers, context)

    def _shares(self, scores: list[Tensor], budgets: list[int]) -> list[Tensor]:
        """What the policy below allots, as numbers."""
        given = self.policy.allot(scores, budgets)
        if given is not None:
            return given
        return [
            torch.full(layer.shape[:2], budget, device=layer.device)
            for layer, budget in zip(scores, budgets, strict=True)
        ]


def _made(policy: object) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if policy == "locret":
        raise ValueError("policy 'locret' needs heads here: give LocretPolicy(heads)")
    known = policies.POLICIES  # which is made of this file's classes, too
    if not isinstance(policy, str) or policy not in known:
        raise ValueError(
            f"policy is {policy!r}; expected a Policy, or one of "
            f"{sorted(name for name in known if name != 'locret')}"
        )
    return known[policy]()


class PyramidLayers(Composed):
    """Budgets that fall linearly with depth (PyramidKV, arXiv 2406.02069), same total but for
    layers that would get nothing and get 1.

    Args:
        policy: see `Composed`.
        beta: the last layer gets 1 / beta of the average.
        window: units that every layer gets besides.
    """

    label = "pyramid"

    def __init__(self, policy: str | Policy, beta: float = 20, window: int = 0) -> None:
        super().__init__(policy)
        check_between("beta", beta, 1)
        check_whole("window", window, 0)
        self.beta = beta
        self.window = window

    def budgets(self, budget: int, num_layers: int, context: int) -> Sequence[int]:
        return [max(b, 1) for b in pyramid(budget, num_layers, context, self.beta, self.window)]


class AdaptiveHeads(Composed):
    """Heads of a layer share what they have (AdaKV, arXiv 2407.11550): the layer's highest scores
    stay, whichever head they are in; every head keeps its own highest `floor` of the budget.

    Cost: a sort of the layer's scores, and one wait for the device, at every eviction.

    Args:
        policy: see `Composed`; its scores should be comparable between heads.
        floor: share of the budget that every head keeps; published 0.2.
    """

    label = "adaptive_heads"

    def __init__(self, policy: str | Policy, floor: float = 0.2) -> None:
        super().__init__(policy)
        check_between("floor", floor, 0, 1)
        self.floor = floor

    def allot(self, scores: list[Tensor], budgets: list[int]) -> list[Tensor]:
        shares = self._shares(scores, budgets)
        counts = []
        for layer, share in zip(scores, shares, strict=True):
            safe = raised(layer, (share * self.floor).long())
            (chosen,) = highest_of_all([safe], share.sum(dim=1))
            counts.append((chosen & (layer > -torch.inf)).sum(dim=-1))
        return counts


class SharedLayers(Composed):
    """Layers share what they have: of all layers' scores, each layer's brought to mean 0 and
    variance 1, the highest stay, and a layer keeps as many units a head as its share allows. Every
    layer keeps `floor` of its budget, at least one unit a head.

    Cost: layers can only evict after the chunk has gone through all of them, so that the peak is
    layers x (budget + chunk); a sort of all scores. What rounding to whole units a head leaves over
    is not used.

    Args:
        policy: see `Composed`.
        floor: share of its budget that every layer keeps.
    """

    label = "shared_layers"

    def __init__(self, policy: str | Policy, floor: float = 0.2) -> None:
        super().__init__(policy)
        if isinstance(self.policy, AdaptiveHeads):
            raise ValueError(
                "SharedLayers gives all heads of a layer alike and would undo AdaptiveHeads: turn "
                "them round, AdaptiveHeads(SharedLayers(...))"
            )
        check_between("floor", floor, 0, 1)
        self.floor = floor
        self.waits = True  # type: ignore[misc]

    def allot(self, scores: list[Tensor], budgets: list[int]) -> list[Tensor]:
        shares = self._shares(scores, budgets)
        safe = [  # nothing attends to a layer that holds nothing
            raised(_normalized(layer), (share * self.floor).long().clamp(min=1))
            for layer, share in zip(scores, shares, strict=True)
        ]
        device = scores[0].device  # layers may be on several
        total = torch.stack([share.sum(dim=1).to(device) for share in shares]).sum(dim=0)
        return [
            (mine.sum(dim=(1, 2))[:, None] // layer.shape[1])
            .expand(layer.shape[:2])
            .maximum((layer == torch.inf).sum(dim=-1))
            for layer, mine in zip(scores, highest_of_all(safe, total), strict=True)
        ]


def _normalized(scores: Tensor) -> Tensor:
    """Scores [B, H, S] of mean 0 and variance 1 over a row's heads and units; what is kept in any
    case and what is empty stays out."""
    counted = (scores > -torch.inf) & (scores < CERTAIN)
    known = torch.where(counted, scores, 0.0)
    number = counted.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    centred = known - known.sum(dim=(1, 2), keepdim=True) / number
    variance = torch.where(counted, centred, 0.0).square().sum(dim=(1, 2), keepdim=True) / number
    scaled = centred / variance.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    scaled = torch.where(scores >= CERTAIN, CERTAIN, scaled)
    return torch.where(scores.isinf(), scores, scaled)
