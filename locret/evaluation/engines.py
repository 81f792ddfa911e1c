"""The engine of a row and budget, made when it is asked for."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from locret.cache.merging import describe_merging
from locret.engine.config import EngineConfig
from locret.engine.engine import Engine
from locret.evaluation.rows import Row
from locret.heads.heads import RetainingHeads
from locret.model.loading import LoadedModel
from locret.policies import POLICIES, LocretPolicy, Policy
from locret.quantities import Budget, Memory

SHOWN = ("chunk_size", "stabilizers", "positions", "budget", "query_aware", "backend", "graphs")
"""Settings of an engine that are told beside figures."""


class Engines:
    """Engines for one model; the latest is kept.

    Args:
        loaded: the model.
        heads: by the name that a row or the run gives them.
        default_heads: the run's own.
        settings: of the engine, for all rows.

    Attributes:
        used: settings of the first engine of every row, by the row's label.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        heads: Mapping[str, RetainingHeads],
        default_heads: str | None,
        settings: Mapping[str, Any],
    ) -> None:
        model = self._model = loaded.model
        self._heads = {n: h.to(model.device, model.dtype) for n, h in heads.items()}
        self._default_heads = default_heads
        self._settings = settings
        self._latest: tuple[Any, Engine] | None = None
        self.used: dict[str, dict[str, Any]] = {}

    def get(self, row: Row, budget: Budget) -> Engine:
        """The engine of a row, attached to nothing until it is used."""
        key = (row.label, budget)
        if self._latest is None or self._latest[0] != key:
            made = self._made(row, budget)
            self._latest = key, made
            self.used.setdefault(row.label, _shown(made))
        return self._latest[1]

    def _made(self, row: Row, budget: Budget) -> Engine:
        heads = self._heads.get(row.heads or self._default_heads or "")
        settings = _settings(row, self._settings, budget)
        if row.protocol == "query_aware" and not row.keeps_all:
            settings["query_aware"] = not are_query_aware(row, heads)
        return Engine(self._model, _policy(row), heads=heads, **settings)


def are_query_aware(row: Row, heads: RetainingHeads | None) -> bool:
    """Whether the row's heads want the question in front of the context."""
    uses_them = row.policy == LocretPolicy.name and not row.keeps_all
    return bool(uses_them and heads is not None and heads.config.query_tokens)


def check_row(row: Row, settings: Mapping[str, Any]) -> None:
    """Refuse what the row's engine would refuse, before there is a model.

    Args:
        settings: of the engine, for all rows.

    Raises:
        ValueError: settings that engines do not have or that cannot work, arguments that the policy
            does not take, or a quantization that cannot be.
    """
    try:
        policy = _policy(row)
    except TypeError as error:
        raise ValueError(f"row {row.label}: policy_args: {error}") from error
    try:
        EngineConfig.of(policy, **_settings(row, settings, row.engine_budget(None)))
    except ValueError as error:
        raise ValueError(f"row {row.label}: {error}") from error


def _settings(row: Row, settings: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
    """The row's settings of the engine, but for what its protocol asks for."""
    own = {} if row.quantization is None else {"quantization": row.quantization}
    return {**settings, **row.engine, **own, "budget": budget}


def _policy(row: Row) -> str | Policy:
    if not row.policy_args or row.policy == LocretPolicy.name:
        return row.policy
    return POLICIES[row.policy](**row.policy_args)


def _shown(engine: Engine) -> dict[str, Any]:
    """What the engine's settings came to be."""
    config, settings = engine.config, engine.config.flat()
    shown = {name: settings[name] for name in SHOWN}
    if isinstance(config.reading.budget, Memory):
        shown["budget"] = str(config.reading.budget)
    shown |= {"merging": describe_merging(config.storage.merging)}
    return shown | ({"recall": asdict(config.storage.recall)} if config.storage.recall else {})
