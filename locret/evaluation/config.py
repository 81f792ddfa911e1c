"""What an evaluation is: a YAML file, with any value overridden on the command line.

Among its values are the setups of the results table, one way to bound the cache each:

    setups:
      - {policy: [locret, keydiff], budget: [4x, 8x, 16x]}
      - {policy: locret, heads: runs/aware/heads, name: locret_q, protocol: query_aware, budget: 8x}

An entry with lists stands for all their combinations. The full cache is a setup of every
table, unless the configuration leaves it out.

Kinds of values are checked by jsonargparse, as those of trainings are; what they mean here.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml

from locret.engine.config import EngineConfig
from locret.heads.heads import RetainingHeads
from locret.model.loading import Dtype
from locret.model.weights import PACKAGES
from locret.policies import POLICIES, LocretPolicy, Policy, policy_in_words
from locret.quantities import Budget, BudgetChoice, budget_of, check_whole, parse_tokens
from locret.system import files
from locret.tasks import DATA, TASKS, Task, TaskSettings, task_names

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

# ---- setups --------------------------------------------------------------------------------------

Protocol = Literal["query_agnostic", "query_aware"]
"""What is known when the context is compressed.

query_agnostic  the context alone is read and compressed
query_aware     the policy sees the question, behind the context's last chunk, before the final
                eviction; query-aware heads get it in front of the context

Either way the question follows the compressed context, and is never evicted.
"""

FULL = "full"
CROSSED = ("policy", "budget", "protocol", "quantization")
"""Keys of an entry that may be lists."""


OF_SETUPS = {
    "budget": "give it beside the policy: {policy: ..., budget: 8x}",
    "quantization": "give it beside the policy: {policy: ..., quantization: {name: kivi, bits: 4}}",
    "query_aware": "give the setup protocol: query_aware",
}
"""Engine settings that are values of a setup, which the table tells of."""


KINDS: dict[str, tuple[Any, str]] = {
    "policy": (str, "a policy's name"),
    "heads": ((str, NoneType), "a folder or Hub id"),
    "name": (str, "a name"),
    "engine": (Mapping, "settings by name"),
    "policy_args": (Mapping, "arguments by name"),
}


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

    def __post_init__(self) -> None:
        if self.quantization == "none":
            object.__setattr__(self, "quantization", None)
        for key, (kind, expected) in KINDS.items():
            if not isinstance(getattr(self, key), kind):
                raise ValueError(f"setups: {key} is {getattr(self, key)!r}; expected {expected}")
        for key, known in {"policy": sorted(POLICIES), "protocol": get_args(Protocol)}.items():
            if getattr(self, key) not in known:
                raise ValueError(
                    f"setups: {key} {getattr(self, key)!r} is unknown; expected one of {known}"
                )
        budget_of(self.budget, f"setups: budget of {self.policy}")

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

    def engine_settings(self, shared: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
        """Settings of the engine, `shared` by all setups unless this one has its own; but for what
        its protocol asks for."""
        own = {} if self.quantization is None else {"quantization": self.quantization}
        return {**shared, **self.engine, **own, "budget": budget}

    def engine_policy(self, tokenizer: Any = None, chat: bool = True) -> str | Policy:
        return policy_in_words(self.policy, tokenizer, chat, **self.policy_args)

    def check(self, shared: Mapping[str, Any]) -> None:
        """Refuse, before there is a model, what its engine would refuse without one (ValueError):
        settings that engines do not have or that cannot work, arguments that the policy does not
        take, or a quantization that cannot be. `shared` are settings for all setups."""
        for name, instead in OF_SETUPS.items():
            if name in {**shared, **self.engine}:
                raise ValueError(f"setup {self.label}: engine settings hold {name}; {instead}")
        try:
            policy = self.engine_policy()
        except TypeError as error:
            raise ValueError(f"setup {self.label}: policy_args: {error}") from error
        try:
            EngineConfig.of(policy, **self.engine_settings(shared, self.engine_budget(None)))
        except ValueError as error:
            raise ValueError(f"setup {self.label}: {error}") from error

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
        Setup(**{**entry, **dict(zip(keys, values, strict=True))})
        for values in itertools.product(*lists)
    ]


def are_query_aware(setup: Setup, heads: RetainingHeads | None) -> bool:
    """Whether the setup's heads want the question in front of the context."""
    uses_them = setup.policy == LocretPolicy.name and not setup.keeps_all
    return bool(uses_them and heads is not None and heads.config.query_tokens)


# ---- the configuration ---------------------------------------------------------------------------

CACHE = "~/.cache/locret"
NEEDED = {"model", "tasks", "setups", "output"}


@dataclass(frozen=True)
class EvalConfig:
    """An evaluation.

    Attributes:
        model, adapter, heads: as for `python -m locret generate`.
        tasks: names of tasks or groups.
        setups: ways to bound the cache (`Setup`).
        output: folder for predictions and results.
        dtype, device, attention: of the model; attention is transformers' `attn_implementation`.
        weights: store the model's weights in fewer bits: int8, nf4 or fp8 (`locret.model.weights`).
        model_config: values in place of the model's own, such as `max_position_embeddings` and
            `rope_parameters` for a longer window; of values by name, those that are given.
        full: ask under the full cache too, whether or not it is among the setups.
        only: names of the setups to ask, and no others but the full cache; empty = all.
        chat_template: put prompts into the tokenizer's chat template.
        answer_prefix: give the first words of answers, for tasks that have some.
        data_dir, data: where the tasks' data lies (`locret.tasks.TaskSettings`).
        lengths: prompt lengths for tasks that are made to a length.
        depths: at which the needles of `locret.tasks.synthetic` stand.
        limit: samples of a task; None = all.
        max_new_tokens: of an answer; None = as each task has it.
        seed: of generated samples.
        max_length: tokens of prompt and answer; longer contexts are cut, and counted. None = the
            model's window, for setups that need it.
        batch_size: samples asked at a time. At 1, samples about one context share its prefill.
        engine: settings of `locret.Engine` for every setup.
        cache_dir: where generated samples are kept.
        smoke: overrides for the small slice that `python -m locret reproduce` runs again.
    """

    model: str
    tasks: tuple[str, ...] | str
    setups: tuple[Mapping[str, Any], ...] | Mapping[str, Any]
    output: str
    adapter: str | None = None
    heads: str | None = None
    dtype: str = "auto"
    device: str | None = None
    attention: str | None = None
    weights: str | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    full: bool = True
    only: tuple[str, ...] | str = ()
    chat_template: bool = True
    answer_prefix: bool = True
    data_dir: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    lengths: tuple[int | str, ...] | int | str = (4096,)
    depths: int = 10
    limit: int | None = None
    max_new_tokens: int | None = None
    seed: int = 42
    max_length: int | None = None
    batch_size: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)
    cache_dir: str = CACHE
    smoke: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Spell lists out, and check values."""
        lengths = _listed(self.lengths)
        object.__setattr__(self, "tasks", _names(self.tasks))
        object.__setattr__(self, "only", _names(self.only))
        texts = [part for given in lengths for part in str(given).split(",")]
        object.__setattr__(self, "lengths", tuple(map(parse_tokens, texts)))
        object.__setattr__(self, "setups", _listed(self.setups))
        for name in ("tasks", "lengths", "setups"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; expected at least one")
        for name in ("limit", "batch_size", "max_length", "depths", "max_new_tokens"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        check_whole("seed", self.seed, 0)
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype is {self.dtype}; expected one of {', '.join(get_args(Dtype))}")
        if self.weights not in (None, *PACKAGES):
            expected = f"one of {', '.join(PACKAGES)}, or null: as saved"
            raise ValueError(f"weights is {self.weights}; expected {expected}")
        if not self.output.strip():
            raise ValueError("output is empty; expected a folder")
        for name in ("model", "heads", "adapter", "data_dir", "cache_dir"):
            files.check_named(getattr(self, name), name)
        for name, path in self.data.items():
            files.check_named(path, f"data {name!r}")
        unknown = sorted(set(self.data) - set(DATA))
        if unknown:
            raise ValueError(f"data has {', '.join(unknown)}; expected some of {', '.join(DATA)}")

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "EvalConfig":
        """The configuration of names and values (errors: `parsed`)."""
        return parsed(parser(), [], given)[0]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def all_setups(self) -> list[Setup]:
        """The setups, the full cache first (errors: `expand`); ValueError
        if `only` names one that is not among them."""
        setups = expand(_listed(self.setups), self.full)
        names = list(dict.fromkeys(setup.name or setup.policy for setup in setups))
        unknown = [name for name in self.only if name not in names]
        if unknown:
            raise ValueError(
                f"only names {', '.join(unknown)}; the setups are called {', '.join(names)}"
            )
        wanted = {*self.only, FULL} if self.only else set(names)
        return [setup for setup in setups if (setup.name or setup.policy) in wanted]

    def make_tasks(self) -> list[Task]:
        """The tasks, one for each length where they are made to a length; ValueError for an unknown
        one, or a data file or package that is not there."""
        kinds = [TASKS[name] for name in task_names(_listed(self.tasks))]
        settings = TaskSettings(
            data_dir=Path(self.data_dir).expanduser() if self.data_dir else None,
            data=dict(self.data),
            depths=self.depths,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            cache_dir=Path(self.cache_dir).expanduser(),
        )
        of_lengths = [replace(settings, length=length) for length in _listed(self.lengths)]
        made = [kind(of_length) for kind in kinds for of_length in of_lengths]
        by_label = {task.label: task for task in made}
        for task in by_label.values():
            task.files()
            task.check_packages()
        return list(by_label.values())


def _names(given: tuple[str, ...] | str) -> tuple[str, ...]:
    """Names in a list or behind commas, or both."""
    return tuple(n for text in _listed(given) for n in text.split(",") if n)


def _listed(value: Any) -> tuple[Any, ...]:
    """One value may stand for a list of it."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def parser(**about: Any) -> "ArgumentParser":
    """What knows the names, kinds and meanings of a configuration's values, for a command that
    `about` tells of."""
    from jsonargparse import ArgumentParser

    made = ArgumentParser(exit_on_error=False, **about)
    made.add_argument("--config", help="a YAML file, or a name in configs/eval")
    made.add_class_arguments(EvalConfig, as_group=False)
    return made


def parsed(
    parser: "ArgumentParser", args: Sequence[str], values: Mapping[str, Any]
) -> tuple[EvalConfig, "Namespace"]:
    """The configuration of `values` with what a command line puts in their place, and everything
    that the command line says; ValueError for a name that is unknown or missing, or a value of the
    wrong kind."""
    from jsonargparse import ArgumentError

    if "rows" in values:
        raise ValueError("the configuration has rows; they are called setups now")
    there = {name: value for name, value in values.items() if value is not None}
    names = [entry.name for entry in fields(EvalConfig)]
    unknown, missing = there.keys() - set(names), NEEDED - there.keys()
    if unknown or missing:
        wrong = [f"unknown {', '.join(sorted(unknown))}"] * bool(unknown)
        wrong += [f"missing {', '.join(sorted(missing))}"] * bool(missing)
        raise ValueError(
            f"the configuration has {' and '.join(wrong)}; expected {', '.join(sorted(names))}"
        )
    try:
        given = parser.parse_args(list(args), namespace=parser.parse_object(there))
    except ArgumentError as error:
        raise ValueError(_in_short(str(error))) from None
    return EvalConfig(**{name: given[name] for name in names}), given


def _in_short(told: str) -> str:
    """A complaint of jsonargparse in one sentence: the value, and what was expected."""
    told = " ".join(told.split())
    one = re.fullmatch(r'Parser key "(.+?)": Expected an? (.+)\. Got value: (.*)', told)
    any_of = re.fullmatch(
        r'Parser key "(.+?)": .*?Subtypes: \[(.+?)\] Errors: .* value: (.*)', told
    )
    found = one or any_of
    if found is None:
        return told
    name, kinds, value = found.groups()
    kinds = re.sub(r"<class '(.+?)'>|typing\.", lambda kind: kind[1] or "", kinds)
    return f"{name} is {value}; expected {kinds}"


def find_config(name: str) -> Path:
    """The file of this name: the user's own, or one in configs/eval/ or configs/; else a ValueError
    lists the configurations there are."""
    return files.find_config(name, ("eval", "."))


def read_values(name: str) -> dict[str, Any]:
    """The names and values in a file; ValueError if there is none, or it holds none."""
    path = find_config(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no names and values")
    return values
