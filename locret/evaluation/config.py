"""What an evaluation is: a YAML file, with any value overridden on the command line.

Kinds of values are checked by jsonargparse, as those of trainings are; what they mean here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from locret.evaluation.setups import FULL, Setup, expand
from locret.model.loading import Dtype
from locret.quantities import check_whole, parse_tokens
from locret.system import files
from locret.tasks import DATA, TASKS, Task, TaskSettings, task_names

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

CACHE = "~/.cache/locret"
NEEDED = {"model", "tasks", "setups", "output"}


@dataclass(frozen=True)
class EvalConfig:
    """An evaluation.

    Attributes:
        model, adapter, heads: as for `python -m locret generate`.
        tasks: names of tasks or groups.
        setups: ways to bound the cache (`locret.evaluation.setups`).
        output: folder for predictions and results.
        dtype, device, attention: of the model; attention is transformers' `attn_implementation`.
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
        lengths = _listed(self.lengths, (int, str))
        object.__setattr__(self, "tasks", _names(self.tasks))
        object.__setattr__(self, "only", _names(self.only))
        texts = [part for given in lengths for part in str(given).split(",")]
        object.__setattr__(self, "lengths", tuple(map(parse_tokens, texts)))
        object.__setattr__(self, "setups", _listed(self.setups, Mapping))
        for name in ("tasks", "lengths", "setups"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; expected at least one")
        for name in ("limit", "batch_size", "max_length", "depths", "max_new_tokens"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        check_whole("seed", self.seed, 0)
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype is {self.dtype}; expected one of {', '.join(get_args(Dtype))}")
        if not self.output.strip():
            raise ValueError("output is empty; expected a folder")
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
        """The setups, the full cache first (errors: `locret.evaluation.setups.expand`); ValueError
        if `only` names one that is not among them."""
        setups = expand(_listed(self.setups, Mapping), self.full)
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
        kinds = [TASKS[name] for name in task_names(_listed(self.tasks, str))]
        settings = TaskSettings(
            data_dir=Path(self.data_dir).expanduser() if self.data_dir else None,
            data=dict(self.data),
            depths=self.depths,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            cache_dir=Path(self.cache_dir).expanduser(),
        )
        of_lengths = [replace(settings, length=length) for length in _listed(self.lengths, int)]
        made = [kind(of_length) for kind in kinds for of_length in of_lengths]
        by_label = {task.label: task for task in made}
        for task in by_label.values():
            task.files()
            task.check_packages()
        return list(by_label.values())


def _names(given: tuple[str, ...] | str) -> tuple[str, ...]:
    """Names in a list or behind commas, or both."""
    return tuple(n for text in _listed(given, str) for n in text.split(",") if n)


def _listed(value: Any, kind: Any) -> tuple[Any, ...]:
    """One entry may stand for a list of it."""
    return (value,) if isinstance(value, kind) else tuple(value)


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
