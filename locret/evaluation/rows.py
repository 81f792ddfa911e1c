"""The rows of a results table: one way to bound the cache each.

    rows:
      - {policy: [locret, keydiff], budget: [4x, 8x, 16x]}
      - {policy: locret, heads: runs/aware/heads, name: locret_q, protocol: query_aware, budget: 8x}

An entry with lists stands for all their combinations. The full cache is a row of every table.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import Any, get_args

from locret.evaluation.prompts import Protocol
from locret.policies import POLICIES
from locret.quantities import Budget, BudgetChoice, budget_of

FULL = "full"
CROSSED = ("policy", "budget", "protocol", "quantization")
"""Keys of an entry that may be lists."""


@dataclass(frozen=True)
class Row:
    """One way to bound the cache.

    Attributes:
        policy: a name of `locret.policies.POLICIES`.
        budget: as the engine's: units a KV head keeps; a share such as 0.125 or "8x", an eighth;
            memory, "2GiB"; one number for each layer, as a list in a list; None = all. Shares are
            of the length that the task is made to, else of the sample's context.
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
        """What the table calls the row; different rows have different labels."""
        name = self.name or self.policy
        parts = [name]
        if not self.keeps_all:
            parts += [str(self.budget), self.protocol]
        if self.quantization is not None:
            parts.append(str(self.quantization))
        return " ".join(parts)

    def engine_budget(self, length: int | None) -> Budget:
        """The engine's budget for a task that is made to `length` tokens: at least one unit. For a
        task that is not made to a length, a share stays one."""
        budget = None if self.keeps_all else budget_of(self.budget)
        if isinstance(budget, float) and length is not None:
            return max(1, round(length * budget))
        return budget

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "", {})}


def expand(entries: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of a configuration, the full cache first.

    Raises:
        ValueError: an unknown key, policy or protocol, a budget that is none, or a row given twice.
    """
    rows = [row for entry in entries for row in _combinations(entry)]
    full = [row for row in rows if row.label == FULL] or [Row(FULL)]
    rows = full + [row for row in rows if row.label != FULL]
    labels = [row.label for row in rows]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"rows {', '.join(twice)} are given twice; give rows that differ in heads or engine "
            "settings names of their own: {name: ...}"
        )
    return rows


EXPECTED = {
    "policy": "a policy's name",
    "heads": "a folder or Hub id",
    "name": "a name",
    "engine": "settings by name",
    "policy_args": "arguments by name",
}


def _combinations(entry: Mapping[str, Any]) -> list[Row]:
    known = set(Row.__dataclass_fields__)
    if not isinstance(entry, Mapping) or "policy" not in entry or set(entry) - known:
        raise ValueError(
            f"rows: {entry} is no row; expected a policy and some of {', '.join(sorted(known))}"
        )
    lists = [_listed(entry[key]) for key in CROSSED if key in entry]
    if not all(lists):
        raise ValueError(f"rows: {entry} has an empty list; expected at least one value")
    keys = [key for key in CROSSED if key in entry]
    return [
        _checked(Row(**{**entry, **dict(zip(keys, values, strict=True))}))
        for values in itertools.product(*lists)
    ]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _checked(row: Row) -> Row:
    kinds: dict[str, Any] = {"policy": str, "heads": (str, NoneType), "name": str}
    kinds |= {"engine": Mapping, "policy_args": Mapping}
    for key, kind in kinds.items():
        if not isinstance(getattr(row, key), kind):
            raise ValueError(f"rows: {key} is {getattr(row, key)!r}; expected {EXPECTED[key]}")
    if row.policy not in POLICIES:
        raise ValueError(
            f"rows: policy {row.policy!r} is unknown; expected one of {sorted(POLICIES)}"
        )
    if row.protocol not in get_args(Protocol):
        raise ValueError(
            f"rows: protocol {row.protocol!r} is unknown; expected one of {get_args(Protocol)}"
        )
    budget_of(row.budget, f"rows: budget of {row.policy}")
    return row
