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

from locret.cache.cache import RetainedCache
from locret.cache.merging import describe_merging
from locret.engine.config import EngineConfig
from locret.engine.engine import Engine
from locret.evaluation.prompts import Protocol
from locret.heads.heads import RetainingHeads
from locret.model.loading import LoadedModel
from locret.policies import POLICIES, LocretPolicy, Policy, policy_in_words
from locret.quantities import Budget, BudgetChoice, ByteShare, Memory, budget_of

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
        words = [name]
        if not self.keeps_all:
            words += [str(self.budget), self.protocol]
        if self.quantization is not None:
            words.append(in_words(self.quantization))
        return " ".join(words)

    def engine_budget(self, length: int | None) -> Budget:
        """The engine's budget for a task that is made to `length` tokens: at least one unit. For a
        task that is not made to a length, a share stays one; a share of the bytes always does."""
        budget = None if self.keeps_all else budget_of(self.budget)
        if isinstance(budget, float) and length is not None:
            return max(1, round(length * budget))
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
    """The setups of a configuration, the full cache first, which is added `with_full`. Raises
    ValueError: an unknown key, policy or protocol, a budget that is none, or a setup twice."""
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


KINDS: dict[str, tuple[Any, str]] = {
    "policy": (str, "a policy's name"),
    "heads": ((str, NoneType), "a folder or Hub id"),
    "name": (str, "a name"),
    "engine": (Mapping, "settings by name"),
    "policy_args": (Mapping, "arguments by name"),
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
    if setup.quantization == "none":
        setup = replace(setup, quantization=None)
    for key, (kind, expected) in KINDS.items():
        if not isinstance(getattr(setup, key), kind):
            raise ValueError(f"setups: {key} is {getattr(setup, key)!r}; expected {expected}")
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


# ---- engines -------------------------------------------------------------------------------------

SHOWN = ("chunk_size", "stabilizers", "positions", "budget", "query_aware", "backend", "graphs")
"""Settings of an engine that are told beside figures."""


class Engines:
    """Engines for one model; the latest is kept.

    Args:
        heads: by the name that a setup or the run gives them; `default_heads` is the run's.
        settings: of the engine, for all setups.
        chat: prompts are in the tokenizer's chat template, if it has one.

    Attributes:
        used: settings of the first engine of every setup, by the setup's label.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        heads: Mapping[str, RetainingHeads],
        default_heads: str | None,
        settings: Mapping[str, Any],
        chat: bool = True,
    ) -> None:
        model = self._model = loaded.model
        self._tokenizer, self._chat = loaded.tokenizer, chat
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
        policy = _policy(setup, self._tokenizer, self._chat)
        return Engine(self._model, policy, heads=heads, **settings)


def are_query_aware(setup: Setup, heads: RetainingHeads | None) -> bool:
    """Whether the setup's heads want the question in front of the context."""
    uses_them = setup.policy == LocretPolicy.name and not setup.keeps_all
    return bool(uses_them and heads is not None and heads.config.query_tokens)


OF_SETUPS = {
    "budget": "give it beside the policy: {policy: ..., budget: 8x}",
    "quantization": "give it beside the policy: {policy: ..., quantization: {name: kivi, bits: 4}}",
    "query_aware": "give the setup protocol: query_aware",
}
"""Engine settings that are values of a setup, which the table tells of."""


def check_setup(setup: Setup, settings: Mapping[str, Any]) -> None:
    """Refuse, before there is a model, what its engine would refuse without one (ValueError):
    settings that engines do not have or that cannot work, arguments that the policy does not take,
    or a quantization that cannot be. `settings` are of the engine, for all setups."""
    given = {**settings, **setup.engine}
    for name, instead in OF_SETUPS.items():
        if name in given:
            raise ValueError(f"setup {setup.label}: engine settings hold {name}; {instead}")
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


def _policy(setup: Setup, tokenizer: Any = None, chat: bool = True) -> str | Policy:
    return policy_in_words(setup.policy, tokenizer, chat, **setup.policy_args)


def _shown(engine: Engine) -> dict[str, Any]:
    """What the engine's settings came to be."""
    config, settings = engine.config, engine.config.flat()
    shown = {name: settings[name] for name in SHOWN}
    if isinstance(config.reading.budget, Memory | ByteShare):
        shown["budget"] = str(config.reading.budget)
    shown |= {"merging": describe_merging(config.storage.merging)}
    if engine.policy.rereads:  # the budget does not bound what is held while a context is read
        shown |= {"rereads": True}
    return shown | ({"recall": asdict(config.storage.recall)} if config.storage.recall else {})


def sizes_of(cache: RetainedCache, row: int, rows: int) -> dict[str, Any]:
    """Units and bytes of one row, by the names that `locret.evaluation.records.Record` gives
    them."""
    report = cache.report()
    tails = [layer.store.tail for layer in cache.layers]
    counts = [layer.store.sequences.counts[row] for layer in cache.layers]
    units = [sum(heads) / len(heads) for heads in counts]
    unequal = any(len(set(heads)) > 1 for heads in counts)
    return {
        "units": (round(sum(units) / len(units), 1), round(max(units))),
        "head_units": (min(map(min, counts)), max(map(max, counts))) if unequal else None,
        "bytes": report["total_bytes"] // rows,
        # Of slots that a growing layer has taken ahead: they hold numbers as they come.
        "room_bytes": sum(t.nbytes - sum(x.nbytes for x in t) for t in tails) // rows,
        "full_bytes": report["full_cache_bytes"] // rows,
    }
