"""The setups of a results table: one way to bound the cache each.

    setups:
      - {policy: [locret, keydiff], budget: [4x, 8x, 16x]}
      - {policy: locret, heads: runs/aware/heads, name: locret_q, protocol: query_aware, budget: 8x}

An entry with lists stands for all their combinations. The full cache is a setup of every
table, unless the configuration leaves it out.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import NoneType
from typing import Any, get_args

from locret.evaluation.prompts import Protocol
from locret.policies import POLICIES
from locret.quantities import Budget, BudgetChoice, ByteShare, budget_of

FULL = "full"
CROSSED = ("policy", "budget", "protocol", "quantization")
"""Keys of an entry that may be lists."""


@dataclass(frozen=True)
class Setup:
    """One way to bound the cache.

    Attributes:
        policy: a name of `locret.policies.POLICIES`.
        budget: as the engine's: units a KV head keeps; a share such as 0.125 or "8x", an eighth;
            "8x bytes", the bytes of an eighth in 16 bits; memory, "2GiB"; one number for each
            layer, as a list in a list; None = all. Shares are of the length that the task is made
            to, else of the sample's context.
        protocol: what is known when the context is compressed.
        heads: an artifact, where it is not the run's.
        quantization: how the cache's keys and values are stored; None = as they are.
        engine: further settings of `locret.Engine`.
        policy_args: of the policy's class.
        name: what the table calls the policy.
    """

    policy: str
    budget: BudgetChoice = None
    protocol: Protocol = "query_agnostic"
    heads: str | None = None
    quantization: Any = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    policy_args: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def keeps_all(self) -> bool:
        """Nothing is ever evicted, so that the protocol makes no difference."""
        return not POLICIES[self.policy].evicts or self.budget is None

    @property
    def label(self) -> str:
        """What the table calls the setup; different setups have different labels."""
        name = self.name or self.policy
        parts = [name]
        if not self.keeps_all:
            parts += [str(self.budget), self.protocol]
        if self.quantization is not None:
            parts.append(in_words(self.quantization))
        return " ".join(parts)

    def engine_budget(self, length: int | None) -> Budget:
        """The engine's budget for a task that is made to `length` tokens: at least one unit. For a
        task that is not made to a length, a share stays one."""
        budget = None if self.keeps_all else budget_of(self.budget)
        if isinstance(budget, float) and length is not None:
            return max(1, round(length * budget))
        if isinstance(budget, ByteShare):
            return replace(budget, context=length)
        return budget

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "", {})}


def in_words(quantization: Any) -> str:
    """How keys and values are stored."""
    if quantization is None:
        return "not quantized"
    if isinstance(quantization, Mapping):
        name, *options = [
            value if key == "name" else f"{key}={value}" for key, value in quantization.items()
        ]
        return " ".join([str(name), *options])
    return str(quantization)


def expand(entries: Sequence[Mapping[str, Any]], with_full: bool = True) -> list[Setup]:
    """The setups of a configuration, the full cache first.

    Args:
        with_full: add the full cache if it is not among them.

    Raises:
        ValueError: an unknown key, policy or protocol, a budget that is none, or a setup
            given twice.
    """
    setups = [setup for entry in entries for setup in _combinations(entry)]
    full = [setup for setup in setups if setup.label == FULL] or [Setup(FULL)] * with_full
    setups = full + [setup for setup in setups if setup.label != FULL]
    labels = [setup.label for setup in setups]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"setups {', '.join(twice)} are given twice; give setups that differ in heads or "
            "engine settings names of their own: {name: ...}"
        )
    return setups


EXPECTED = {
    "policy": "a policy's name",
    "heads": "a folder or Hub id",
    "name": "a name",
    "engine": "settings by name",
    "policy_args": "arguments by name",
}


def _combinations(entry: Mapping[str, Any]) -> list[Setup]:
    known = set(Setup.__dataclass_fields__)
    if not isinstance(entry, Mapping) or "policy" not in entry or set(entry) - known:
        raise ValueError(
            f"setups: {entry} is no setup; expected a policy and some of {', '.join(sorted(known))}"
        )
    lists = [_listed(entry[key]) for key in CROSSED if key in entry]
    if not all(lists):
        raise ValueError(f"setups: {entry} has an empty list; expected at least one value")
    keys = [key for key in CROSSED if key in entry]
    return [
        _checked(Setup(**{**entry, **dict(zip(keys, values, strict=True))}))
        for values in itertools.product(*lists)
    ]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _checked(setup: Setup) -> Setup:
    kinds: dict[str, Any] = {"policy": str, "heads": (str, NoneType), "name": str}
    kinds |= {"engine": Mapping, "policy_args": Mapping}
    for key, kind in kinds.items():
        if not isinstance(getattr(setup, key), kind):
            raise ValueError(f"setups: {key} is {getattr(setup, key)!r}; expected {EXPECTED[key]}")
    if setup.policy not in POLICIES:
        raise ValueError(
            f"setups: policy {setup.policy!r} is unknown; expected one of {sorted(POLICIES)}"
        )
    if setup.protocol not in get_args(Protocol):
        raise ValueError(
            f"setups: protocol {setup.protocol!r} is unknown; expected one of {get_args(Protocol)}"
        )
    budget_of(setup.budget, f"setups: budget of {setup.policy}")
    return setup
