"""The engine of a setup and budget, made when it is asked for, and what its cache really holds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from locret.cache.cache import RetainedCache
from locret.cache.merging import describe_merging
from locret.engine.config import EngineConfig
from locret.engine.engine import Engine
from locret.evaluation.setups import Setup
from locret.heads.heads import RetainingHeads
from locret.model.loading import LoadedModel
from locret.policies import POLICIES, LocretPolicy, Policy
from locret.quantities import Budget, ByteShare, Memory

SHOWN = ("chunk_size", "stabilizers", "positions", "budget", "query_aware", "backend", "graphs")
"""Settings of an engine that are told beside figures."""


class Engines:
    """Engines for one model; the latest is kept.

    Args:
        loaded: the model.
        heads: by the name that a setup or the run gives them.
        default_heads: the run's own.
        settings: of the engine, for all setups.

    Attributes:
        used: settings of the first engine of every setup, by the setup's label.
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

    def get(self, setup: Setup, budget: Budget) -> Engine:
        """The engine of a setup, attached to nothing until it is used."""
        key = (setup.label, budget)
        if self._latest is None or self._latest[0] != key:
            made = self._made(setup, budget)
            self._latest = key, made
            self.used.setdefault(setup.label, _shown(made))
        return self._latest[1]

    def _made(self, setup: Setup, budget: Budget) -> Engine:
        heads = self._heads.get(setup.heads or self._default_heads or "")
        settings = _settings(setup, self._settings, budget)
        if setup.protocol == "query_aware" and not setup.keeps_all:
            settings["query_aware"] = not are_query_aware(setup, heads)
        return Engine(self._model, _policy(setup), heads=heads, **settings)


def are_query_aware(setup: Setup, heads: RetainingHeads | None) -> bool:
    """Whether the setup's heads want the question in front of the context."""
    uses_them = setup.policy == LocretPolicy.name and not setup.keeps_all
    return bool(uses_them and heads is not None and heads.config.query_tokens)


def check_setup(setup: Setup, settings: Mapping[str, Any]) -> None:
    """Refuse what the setup's engine would refuse, before there is a model.

    Args:
        settings: of the engine, for all setups.

    Raises:
        ValueError: settings that engines do not have or that cannot work, arguments that the policy
            does not take, or a quantization that cannot be.
    """
    try:
        policy = _policy(setup)
    except TypeError as error:
        raise ValueError(f"setup {setup.label}: policy_args: {error}") from error
    try:
        EngineConfig.of(policy, **_settings(setup, settings, setup.engine_budget(None)))
    except ValueError as error:
        raise ValueError(f"setup {setup.label}: {error}") from error


def _settings(setup: Setup, settings: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
    """The setup's settings of the engine, but for what its protocol asks for."""
    own = {} if setup.quantization is None else {"quantization": setup.quantization}
    return {**settings, **setup.engine, **own, "budget": budget}


def _policy(setup: Setup) -> str | Policy:
    if not setup.policy_args or setup.policy == LocretPolicy.name:
        return setup.policy
    return POLICIES[setup.policy](**setup.policy_args)


def _shown(engine: Engine) -> dict[str, Any]:
    """What the engine's settings came to be."""
    config, settings = engine.config, engine.config.flat()
    shown = {name: settings[name] for name in SHOWN}
    if isinstance(config.reading.budget, Memory | ByteShare):
        shown["budget"] = str(config.reading.budget)
    shown |= {"merging": describe_merging(config.storage.merging)}
    return shown | ({"recall": asdict(config.storage.recall)} if config.storage.recall else {})


def held_of(cache: RetainedCache, row: int, rows: int) -> dict[str, Any]:
    """Units and bytes of one row.

    Returns:
        `units`: (mean, largest) number of units of a head, over layers; `bytes`: the row's share
        of the storage; `full_bytes`: its share of the keys and values of a full cache.
    """
    report = cache.report()
    units = [
        layer.held - (0.0 if layer.empty is None else float(layer.empty[row].float().mean()))
        for layer in cache.layers
    ]
    return {
        "units": (round(sum(units) / len(units), 1), round(max(units))),
        "bytes": report["total_bytes"] // rows,
        "full_bytes": report["full_cache_bytes"] // rows,
    }
