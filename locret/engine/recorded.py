"""What a setting of the engine is that a user leaves out: what the heads record, or else what the
paper sets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from locret.heads.heads import HeadsConfig
from locret.heads.quotas import Quotas, quotas_of

Auto = Literal["auto"]

PAPER = {"budget": 16384, "stabilizers": 2500, "local_tokens": 100}
"""The engine settings of the paper, where neither the user nor the heads say otherwise."""

RECORDED: Literal["recorded"] = "recorded"
"""The size of chunks that the heads record, or else "auto"."""


@dataclass(frozen=True)
class Recorded:
    """What the heads record, or else the paper: "auto" stands for these values."""

    settings: Mapping[str, int]
    """Those of `PAPER`, and `chunk_size` where the heads record it."""
    positions: Any = "compact"
    longrope: Any = "long"
    query_tokens: int = 0
    """Tokens of the question that the heads read in front of the prompt (Locret-Q); 0 = none."""
    quotas: Quotas | None = None
    """Of the heads, where they score; None = equal."""

    @classmethod
    def by(cls, heads: HeadsConfig | None, query_tokens: int, scores: bool) -> "Recorded":
        """What these heads record.

        Args:
            query_tokens: of the heads that score; heads may be given for their settings alone.
            scores: these heads score.
        """
        if heads is None:
            return cls(PAPER, query_tokens=query_tokens)
        settings = PAPER | heads.defaults
        if "stabilizers" not in heads.defaults and settings["budget"] < PAPER["budget"]:
            settings["stabilizers"] = PAPER["stabilizers"] * settings["budget"] // PAPER["budget"]
        quotas = quotas_of(heads.quotas) if scores else None
        return cls(settings, heads.positions, heads.longrope, query_tokens, quotas)

    def stabilizers_for(self, budget: int | None) -> int:
        """The recorded stabilizers, fewer in proportion where the budget is smaller."""
        most = self.settings["budget"]
        least = most if budget is None else min(budget, most)
        return self.settings["stabilizers"] * least // most
