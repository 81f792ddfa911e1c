"""The engine's settings: what "auto" stands for, and what cannot work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from locret.cache.cache import Positions
from locret.cache.sizing import Sizing
from locret.policies.base import Policy
from locret.quantities import format_bytes, is_whole, parse_bytes

Auto = Literal["auto"]


@dataclass(frozen=True)
class Memory:
    """A budget in bytes, of the units of all layers."""

    nbytes: int


Budget = int | float | Sequence[int] | Memory | None
"""Units every KV head keeps: a number; a share of the context, below 1; one number for each layer;
what fits into a memory; None = all."""

PAPER = {"budget": 16384, "chunk_size": 3072, "stabilizers": 2500, "local_tokens": 100}
"""The engine settings of the paper, where neither the user nor the heads say otherwise."""


@dataclass(frozen=True)
class Settings:
    """How a prompt is read; see `locret.Engine` for what each field means."""

    budget: Budget
    chunk_size: int | None
    stabilizers: int | Auto
    local_tokens: int
    positions: Positions
    decode_interval: int | None
    recorded: dict[str, int]

    @classmethod
    def resolve(
        cls,
        defaults: dict[str, int],
        budget: Budget | Auto,
        chunk_size: int | None | Auto,
        stabilizers: int | Auto,
        local_tokens: int | Auto,
        positions: Positions,
        decode_interval: int | None,
    ) -> "Settings":
        """Settings with "auto" replaced by what heads record (`defaults`), else by the paper's."""
        recorded = _recorded(defaults)
        share = isinstance(budget, Memory) or (isinstance(budget, float) and 0 < budget < 1)
        if stabilizers == "auto" and not share:
            stabilizers = recorded["stabilizers"]
            smallest = _smallest(budget)
            if smallest is not None and smallest < recorded["budget"]:
                stabilizers = stabilizers * smallest // recorded["budget"]
        return cls(
            budget=recorded["budget"] if budget == "auto" else budget,
            chunk_size=recorded["chunk_size"] if chunk_size == "auto" else chunk_size,
            stabilizers=stabilizers,
            local_tokens=recorded["local_tokens"] if local_tokens == "auto" else local_tokens,
            positions=positions,
            decode_interval=decode_interval,
            recorded=recorded,
        )

    def check(self, query_tokens: int, num_layers: int) -> None:
        """Refuse settings that cannot work.

        Raises:
            ValueError: says which, and what to change.
        """
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions is {self.positions!r}; expected 'compact' or 'original'")
        self._check_budget(num_layers)
        if self.chunk_size is not None and not is_whole(self.chunk_size, 1):
            raise ValueError(f"chunk_size is {self.chunk_size!r}; expected at least 1, or None")
        if not is_whole(self.local_tokens, 1):
            raise ValueError(
                f"local_tokens is {self.local_tokens!r}; expected at least 1: the answer starts "
                "from the last token of the prompt, which is read after the final eviction"
            )
        if self.decode_interval is not None and not is_whole(self.decode_interval, 1):
            raise ValueError(
                f"decode_interval is {self.decode_interval!r}; expected at least 1, or None for no "
                "eviction while answering"
            )
        if self.stabilizers == "auto":
            return
        if not is_whole(self.stabilizers, 0):
            raise ValueError(f"stabilizers is {self.stabilizers!r}; expected zero or more")
        smallest = _smallest(self.budget)
        if smallest is not None and self.stabilizers + query_tokens > smallest:
            query = f" and the heads keep {query_tokens} query tokens" * bool(query_tokens)
            raise ValueError(
                f"stabilizers is {self.stabilizers}{query} but the budget is {smallest}: they "
                "are kept within the budget; lower stabilizers or raise the budget"
            )

    def _check_budget(self, num_layers: int) -> None:
        budget: Any = self.budget
        if budget is None or isinstance(budget, Memory):
            return
        if isinstance(budget, float):
            if not 0 < budget < 1:
                raise ValueError(
                    f"budget is {budget}; a share of the context is between 0 and 1, and a number "
                    "of units is a whole one"
                )
        elif isinstance(budget, int) and not isinstance(budget, bool):
            if budget < 1:
                raise ValueError(f"budget is {budget}; expected at least 1, or None for no limit")
        elif isinstance(budget, str) or not isinstance(budget, Sequence):
            raise ValueError(
                f"budget is {budget!r}; expected a whole number of units, a share of the context, "
                "one number for each layer, or None; give memory as budget_bytes"
            )
        elif len(budget) != num_layers or not all(is_whole(units, 1) for units in budget):
            raise ValueError(
                f"budget is {list(budget)}; expected one whole number of at least 1 for each of "
                f"the {num_layers} layers"
            )

    def budgets(self, policy: Policy, sizing: Sizing, context: int) -> tuple[int, ...] | None:
        """Units that every layer keeps of a context of that many tokens; None = all.

        Raises:
            ValueError: not one unit fits into the memory.
        """
        budget: Any = self.budget
        if budget is None or not sizing.num_layers:
            return None

        def of_layers(average: int) -> Sequence[int]:
            return sizing.shared(policy.budgets(average, sizing.num_layers, context))

        if isinstance(budget, Memory):
            nbytes, windows = budget.nbytes, sizing.window_bytes(context)
            budget = sizing.units_within(nbytes - windows, max(context, 1), of_layers)
            if not budget:
                also = f", sliding windows {format_bytes(windows)}" if windows else ""
                raise ValueError(
                    f"budget_bytes is {format_bytes(nbytes)}; one unit in every KV head takes "
                    f"{format_bytes(sizing.cache_bytes(of_layers(1)))}{also}"
                )
        if isinstance(budget, float):
            budget = max(1, round(budget * context))
        return tuple(of_layers(budget) if isinstance(budget, int) else budget)

    def answer_budgets(
        self, policy: Policy, sizing: Sizing, prompt: int, last: int
    ) -> tuple[int, ...] | None:
        """Units that every layer keeps while an answer comes, where that depends on the tokens: a
        share is of the whole prompt's, and memory holds what fits into it of `last` tokens, the
        prompt's and the answer's. None = what it kept of the context."""
        if isinstance(self.budget, Memory):
            return self.budgets(policy, sizing, last)
        return self.budgets(policy, sizing, prompt) if isinstance(self.budget, float) else None

    def stabilizers_for(self, budgets: Sequence[int]) -> int:
        """Stabilizers where layers keep `budgets`: in the recorded proportion, if "auto"."""
        if self.stabilizers != "auto":
            return self.stabilizers
        smallest = min(min(budgets), self.recorded["budget"])
        return self.recorded["stabilizers"] * smallest // self.recorded["budget"]


def _recorded(defaults: dict[str, int]) -> dict[str, int]:
    """The heads' settings, the paper's for those not recorded; its stabilizers in proportion."""
    settings = PAPER | defaults
    if "stabilizers" not in defaults and settings["budget"] < PAPER["budget"]:
        settings["stabilizers"] = PAPER["stabilizers"] * settings["budget"] // PAPER["budget"]
    return settings


def _smallest(budget: Any) -> int | None:
    """The smallest budget of any layer; None where it is not known, or there is none."""
    if isinstance(budget, int):
        return budget
    known = isinstance(budget, Sequence) and not isinstance(budget, str) and len(budget) > 0
    return min(budget) if known and all(is_whole(units, 0) for units in budget) else None


def memory_budget(budget: Any, budget_bytes: int | str | None) -> Any:
    """The budget, which may be given as units or as bytes.

    Raises:
        ValueError: it is given as both, or not an amount of memory.
    """
    if budget_bytes is None:
        return budget
    if budget != "auto":
        raise ValueError(
            f"budget is {budget!r} and budget_bytes {budget_bytes!r}; give one of them"
        )
    if isinstance(budget_bytes, str):
        return Memory(parse_bytes(budget_bytes))
    if not is_whole(budget_bytes, 1):
        raise ValueError(
            f"budget_bytes is {budget_bytes!r}; expected at least 1, or such as '2GiB'"
        )
    return Memory(budget_bytes)
