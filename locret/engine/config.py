"""The engine's settings, in three groups, and everything that they can have wrong.

    config = EngineConfig.of("snapkv", budget="8x", quantization="kivi")
    config.reading.budget, config.storage.quantization

`EngineConfig.of` takes the flat keywords of `locret.Engine` and refuses what cannot work whatever
the model is; `EngineConfig.for_model` refuses what a model cannot do. Whoever takes settings from a
user (the engine, an evaluation's rows, lm-evaluation-harness, the commands) makes one of these
first, so that a mistake is told before a model is loaded.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from locret.cache.cache import Positions, check_storage
from locret.cache.context import Counts
from locret.cache.merging import Merging, merging_of
from locret.cache.recall import Recall, recall_of
from locret.cache.sizing import Sizing
from locret.engine.budgets import head_counts, layer_budgets
from locret.engine.chunk_size import chosen_chunk, chunk_bytes, memory_beside_weights
from locret.engine.steps import why_not_graphed
from locret.heads.heads import HeadsConfig
from locret.heads.quotas import Quotas, quotas_of, within_slots
from locret.model.backbone import Backbone
from locret.model.backends import Backend, available, check_backend, fastest
from locret.model.rotary import LongRopeRule
from locret.policies import POLICIES, LocretPolicy, Policy
from locret.policies.base import Eviction
from locret.quantities import (
    Budget,
    ByteShare,
    Memory,
    budget_of,
    check_whole,
    is_whole,
    parse_bytes,
)
from locret.quantization import Scheme, scheme_of

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
        return self.settings["stabilizers"] * min(budget or most, most) // most


@dataclass(frozen=True)
class Reading:
    """How a prompt is read, and how much is kept of it: as `locret.Engine` says."""

    budget: Budget
    quotas: Quotas | None
    chunk_size: int | None | Auto
    """ "auto" until the model is known."""
    stabilizers: int | Auto
    """ "auto" = in the recorded proportion, where the budget is known with the context only."""
    local_tokens: int
    positions: Positions
    longrope: LongRopeRule
    query_aware: bool
    decode_interval: int | None

    @property
    def chunk(self) -> int | None:
        """`chunk_size`, of settings that are for a model."""
        assert self.chunk_size != "auto"
        return self.chunk_size


@dataclass(frozen=True)
class Storage:
    """How the cache stores units, and what becomes of evicted ones."""

    quantization: Scheme
    merging: Merging | None
    recall: Recall | None


@dataclass(frozen=True)
class Compute:
    """How layers are computed."""

    backend: Backend | Auto
    graphs: bool | Auto


DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("budget", "quotas", "stabilizers", "local_tokens"), "auto"),
    **dict.fromkeys(("positions", "longrope", "backend", "graphs"), "auto"),
    **dict.fromkeys(("decode_interval", "quantization", "merging", "recall"), None),
    "chunk_size": RECORDED,
    "query_aware": False,
}
"""The settings by name, with what each is where the user does not say."""

ALIAS = "budget_bytes"
"""The old name of a budget that is memory, taken with a warning."""


@dataclass(frozen=True)
class EngineConfig:
    """The settings of an engine, "auto" replaced, checked."""

    reading: Reading
    storage: Storage
    compute: Compute
    recorded: Recorded
    """What "auto" stood for."""

    @classmethod
    def of(
        cls,
        policy: str | Policy | None = None,
        heads: HeadsConfig | None = None,
        query_tokens: int | None = None,
        /,
        **flat: Any,
    ) -> "EngineConfig":
        """The settings that a user gives by name.

        Args:
            policy: what ranks units; None = any that evicts.
            heads: the record of the heads given, if any.
            query_tokens: tokens of the question that heads read in front of the prompt; None = what
                `heads` record, if the policy scores with them.
            **flat: the settings of `locret.Engine`, as it takes them.

        Raises:
            ValueError: an unknown policy or setting, or what works with no model; says what to
                change.
        """
        given = DEFAULTS | _renamed(flat)
        evicts = _policy_or_class(policy).evicts  # of a composed one, what its own says
        core = policy.core if isinstance(policy, Policy) else policy
        scores = isinstance(core, LocretPolicy) or core == LocretPolicy.name
        if query_tokens is None:
            query_tokens = heads.query_tokens if heads and scores else 0
        recorded = Recorded.by(heads, query_tokens, scores)
        scheme, merging = scheme_of(given["quantization"]), merging_of(given["merging"])
        config = cls(
            _reading(given, recorded, evicts),
            Storage(scheme, merging, recall_of(given["recall"])),
            Compute(given["backend"], given["graphs"]),
            recorded,
        )
        config._check()
        if _policy_or_class(policy).rereads:
            config._check_rereading()
        return config

    def for_model(self, backbone: Backbone) -> "EngineConfig":
        """These settings for one model: what was left "auto" until now is chosen. ValueError: what
        this model cannot do; says what to change."""
        layers, budget = backbone.geometry.num_layers, self.reading.budget
        if isinstance(budget, tuple) and len(budget) != layers:
            raise ValueError(
                f"budget is {list(budget)}; expected one whole number of at least 1 for each of "
                f"the {layers} layers"
            )
        quotas, merging = self.reading.quotas, self.storage.merging
        if quotas is not None:
            quotas.check_shape(layers, backbone.geometry.num_kv_heads)
        if merging is not None and merging.fold and backbone.softcapped:
            raise ValueError("merging fold adds to logits, which this model caps; leave fold out")
        backend = _backend(self.compute.backend, backbone)
        graphs = _graphs(self.compute.graphs, backbone, self.storage.recall)
        reading = self.reading
        if reading.chunk_size == "auto":
            packs = self.storage.quantization.packs
            reading = replace(reading, chunk_size=_chunk_size(reading, packs, backbone))
        return replace(self, reading=reading, compute=Compute(backend, graphs))

    def flat(self) -> dict[str, Any]:
        """The settings by name."""
        groups = (self.reading, self.storage, self.compute)
        return {entry.name: getattr(g, entry.name) for g in groups for entry in fields(g)}

    def sizing(self, backbone: Backbone) -> Sizing:
        """What units take in the cache of one row."""
        return Sizing.of(
            self.storage.quantization,
            backbone.geometry,
            backbone.model.dtype.itemsize,
            backbone.windows,
            weighs=self.storage.merging is not None,
            scored=self.reading.decode_interval is not None,
            query_tokens=self.recorded.query_tokens,
            window=_window(self.reading, backbone.config),
            chunk=self.reading.chunk or 0,
        )

    def counts(self, policy: Policy, sizing: Sizing, context: int) -> Counts | None:
        """Units that every KV head of every layer keeps of a context of that many tokens,
        [layers][KV heads]: the layers' budgets, dealt out by the quotas. None = all. ValueError:
        not one unit fits into the memory."""
        budget, quotas = self.reading.budget, self.reading.quotas
        budgets = layer_budgets(budget, quotas, policy, sizing, context)
        return None if budgets is None else head_counts(budgets, quotas, sizing, context)

    def answer_counts(
        self, policy: Policy, sizing: Sizing, kept: Counts, prompt: int, last: int
    ) -> Counts:
        """Units that every head of every layer keeps while an answer comes, of `last` tokens with
        the prompt's. A share is of the prompt's, memory holds what fits into it of them all, and
        other budgets are what was `kept` of the context, as far as there are slots for it."""
        budget, slots = self.reading.budget, sizing.head_slots(last)
        if isinstance(budget, Memory):
            return self.counts(policy, sizing, last) or kept
        if isinstance(budget, float | ByteShare):
            return self.counts(policy, replace(sizing, beside=last - prompt), prompt) or kept
        return kept if slots is None else within_slots(kept, slots, isinstance(budget, tuple))

    def eviction(self, counts: Counts, query: int = 0, above: int = 0, **others: Any) -> Eviction:
        """The eviction of layers whose heads keep `counts`, with stabilizers, in the recorded
        proportion if they are "auto"; arguments of `Eviction`."""
        stabilizers, average = self.reading.stabilizers, None
        if self.reading.quotas is not None:  # layers are unequal, as heads are
            average = sum(map(sum, counts)) // sum(map(len, counts))
        if stabilizers == "auto":
            smallest = min(sum(heads) // len(heads) for heads in counts)
            stabilizers = self.recorded.stabilizers_for(average or smallest)
        return Eviction(counts, stabilizers, query, above, average=average, **others)

    def _check(self) -> None:
        reading, storage, compute = self.reading, self.storage, self.compute
        _check_values(reading)
        _check_stabilizers(reading, self.recorded.query_tokens)
        check_storage(reading.positions, storage.quantization, storage.merging, storage.recall)
        if reading.query_aware and self.recorded.query_tokens:
            raise ValueError(
                "query_aware=True, but these heads read the question in front of the prompt "
                "already; leave it out"
            )
        if compute.backend != "auto":
            check_backend(compute.backend)
        _check_choice("graphs", compute.graphs, (True, False, "auto"))
        keeps_all = reading.budget is None and reading.chunk_size is None
        if compute.backend == "minference" and not keeps_all:
            raise ValueError(
                "backend 'minference' reads a whole prompt at once and evicts nothing; use it with "
                "policy='full' and chunk_size=None"
            )

    def _check_rereading(self) -> None:
        given = self.flat()
        for name in ("decode_interval", "recall"):
            if given[name] is not None:
                raise ValueError(
                    f"{name} does not go with a policy that scores the whole context by reading it "
                    f"again, and evicts once; leave {name} out, or choose another policy"
                )


def _policy_or_class(policy: str | Policy | None) -> Policy | type[Policy]:
    """A policy as it is given, or the class of that name. ValueError: there is no policy of that
    name."""
    if policy is None:
        return Policy
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        known = f"a Policy, or one of {sorted(POLICIES)}"
        raise ValueError(f"policy {policy!r:.80} is unknown; expected {known}")
    return POLICIES[policy]


def _renamed(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given, by the names of `DEFAULTS`."""
    given = dict(flat)
    nbytes = given.pop(ALIAS, None)
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise ValueError(
            f"engine settings {', '.join(unknown)} are unknown; expected some of "
            f"{', '.join(sorted(DEFAULTS))}"
        )
    if nbytes is not None:
        given["budget"] = _budget_of_bytes(nbytes, given.get("budget", "auto"))
    return given


def _budget_of_bytes(nbytes: Any, budget: Any) -> Memory:
    """The budget where it is given by its old name."""
    if budget != "auto":
        raise ValueError(f"budget is {budget!r} and {ALIAS} {nbytes!r}; give budget alone")
    if isinstance(nbytes, str):
        memory = Memory(parse_bytes(nbytes))
    elif is_whole(nbytes, 1):
        memory = Memory(int(nbytes))
    else:
        raise ValueError(f"{ALIAS} is {nbytes!r}; expected at least 1, or such as '2GiB'")
    told = f"{ALIAS} is called budget now, which takes bytes too: use budget={str(memory)!r}"
    warnings.warn(told, FutureWarning, stacklevel=5)  # the caller of Engine(...)
    return memory


def _reading(given: Mapping[str, Any], recorded: Recorded, evicts: bool) -> Reading:
    """The settings of reading, "auto" replaced by what is recorded."""

    def chosen(name: str) -> Any:
        auto = isinstance(given[name], str) and given[name] == "auto"  # arrays compare by element
        return recorded.settings[name] if auto else given[name]

    budget, stabilizers = budget_of(chosen("budget")), given["stabilizers"]
    if not evicts:
        budget = None
    if stabilizers == "auto" and not isinstance(budget, float | Memory | ByteShare):
        stabilizers = recorded.stabilizers_for(_smallest(budget))
    positions, longrope = given["positions"], given["longrope"]
    quotas, chunk_size = given["quotas"], given["chunk_size"]
    if chunk_size == RECORDED:
        chunk_size = recorded.settings.get("chunk_size", "auto")
    by_heads = isinstance(quotas, str) and quotas == "auto"
    return Reading(
        budget=budget,
        quotas=recorded.quotas if by_heads else quotas_of(quotas),
        chunk_size=chunk_size,
        stabilizers=stabilizers,
        local_tokens=chosen("local_tokens"),
        positions=recorded.positions if positions == "auto" else positions,
        longrope=recorded.longrope if longrope == "auto" else longrope,
        query_aware=given["query_aware"],
        decode_interval=given["decode_interval"] if evicts else None,
    )


def _smallest(budget: Budget) -> int | None:
    """The smallest budget of any layer; None where there is none, or it is not known yet."""
    if isinstance(budget, tuple):
        return min(budget)
    return budget if isinstance(budget, int) else None


def _check_values(reading: Reading) -> None:
    _check_choice("longrope", reading.longrope, get_args(LongRopeRule))
    _check_choice("query_aware", reading.query_aware, (True, False))
    if reading.chunk_size not in (None, "auto"):
        check_whole("chunk_size", reading.chunk_size, 1, ", None, 'auto' or 'recorded'")
    why = ": the answer starts from the last token of the prompt, read after the final eviction"
    check_whole("local_tokens", reading.local_tokens, 1, why)
    if reading.decode_interval is not None:
        instead = ", or None for no eviction while answering"
        check_whole("decode_interval", reading.decode_interval, 1, instead)


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _check_stabilizers(reading: Reading, query_tokens: int) -> None:
    stabilizers, smallest = reading.stabilizers, _smallest(reading.budget)
    if stabilizers == "auto":
        return
    check_whole("stabilizers", stabilizers, 0, " or 'auto'")
    if smallest is not None and stabilizers + query_tokens > smallest:
        query = f" and the heads keep {query_tokens} query tokens" * bool(query_tokens)
        raise ValueError(
            f"stabilizers is {stabilizers}{query} but the budget is {smallest}: they are kept "
            "within the budget; lower stabilizers or raise the budget"
        )


def _backend(backend: Backend | Auto, backbone: Backbone) -> Backend:
    model, size = backbone.model, backbone.geometry.head_size
    device = backbone.layers[0].device
    if backend == "auto":
        return "eager" if backbone.backend == "eager" else fastest(device, model.dtype, size)
    reason = available(backend, device, model.dtype, size)
    if reason is not None:
        raise ValueError(f"backend {backend!r} does not work here: {reason}; leave it 'auto'")
    return backend


def _chunk_size(reading: Reading, packs: bool, backbone: Backbone) -> int:
    config, kind = backbone.config, backbone.layers[0].device.type
    room, memory = _room(reading, config), memory_beside_weights(backbone)
    token_bytes = chunk_bytes(backbone.geometry, config, backbone.model.dtype, head_width=0)
    return chosen_chunk(kind, packs, room, memory, token_bytes)


def _window(reading: Reading, config: Any) -> int | None:
    """The model's window where slots are reused; None = they are not, or it has none."""
    compact = reading.positions == "compact"
    return getattr(config, "max_position_embeddings", None) if compact else None


def _room(reading: Reading, config: Any) -> int | None:
    """Slots of the window for a chunk, beside what is kept and a question in sight: half of all
    where a head may keep any number. None = none is reused, or what is kept does not fit anyway."""
    window = _window(reading, config)
    if window is None or reading.budget is None:
        return None
    most = max(reading.budget) if isinstance(reading.budget, tuple) else reading.budget
    if reading.quotas is not None or not isinstance(most, int):
        return window // 2  # heads keep fewer where a question takes slots
    asked = reading.local_tokens - 1 if reading.query_aware else 0
    return window - most - asked if most < window else None


def _graphs(graphs: bool | Auto, backbone: Backbone, recall: Recall | None) -> bool:
    by_host = "recall chooses blocks on the host at every step"
    reason = why_not_graphed(backbone) if recall is None else by_host
    if graphs is True and reason is not None:
        raise ValueError(f"graphs=True does not work here: {reason}; leave it 'auto'")
    return reason is None and graphs is not False
