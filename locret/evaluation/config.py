"""What an evaluation is: a YAML file, with any value overridden on the command line."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from locret.evaluation.rows import Row, expand
from locret.model.loading import Dtype
from locret.quantities import is_whole
from locret.system import files
from locret.tasks import TASKS, Task, TaskSettings, task_names

CACHE = "~/.cache/locret"

LISTS: dict[str, Any] = {"tasks": str, "rows": Mapping, "lengths": int}
"""Values that are lists, and of what; one entry may stand for a list of it."""

KINDS = {str: "names", Mapping: "names and values", int: "whole numbers"}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return is_whole(value, 1)


TEXTS = ("model", "output", "adapter", "heads", "device", "attention", "data_dir", "cache_dir")
EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(TEXTS, (_is_text, "a text")),
    **dict.fromkeys(
        ("limit", "batch_size", "max_length"), (_is_count, "a whole number of at least 1")
    ),
    "lengths": (lambda given: all(map(_is_count, given)), "whole numbers of at least 1"),
    "seed": (lambda given: is_whole(given, 0), "a whole number of at least 0"),
    "chat_template": (lambda given: isinstance(given, bool), "true or false"),
    "dtype": (lambda given: given in get_args(Dtype), f"one of {', '.join(get_args(Dtype))}"),
    "data": (lambda given: all(map(_is_text, given.values())), "a path for each name"),
}
"""What a value must be, unless it is None."""


@dataclass(frozen=True)
class EvalConfig:
    """An evaluation.

    Attributes:
        model, adapter, heads: as for `python -m locret generate`.
        tasks: names of tasks or groups.
        rows: the table's rows (`locret.evaluation.rows`).
        output: folder for predictions and results.
        dtype, device, attention: of the model; attention is transformers' `attn_implementation`.
        chat_template: put prompts into the tokenizer's chat template.
        data_dir, data: where the tasks' data lies (`locret.tasks.TaskSettings`).
        lengths: prompt lengths for tasks that are made to a length.
        limit: samples of a task; None = all.
        seed: of generated samples.
        max_length: tokens of prompt and answer; longer contexts are cut, and counted. None = the
            model's window, for rows that need it.
        batch_size: samples asked at a time. At 1, samples about one context share its prefill.
        engine: settings of `locret.Engine` for every row.
        cache_dir: where generated samples are kept.
        smoke: overrides for the small slice that `python -m locret reproduce` runs again.
    """

    model: str
    tasks: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    output: str
    adapter: str | None = None
    heads: str | None = None
    dtype: str = "auto"
    device: str | None = None
    attention: str | None = None
    chat_template: bool = True
    data_dir: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    lengths: tuple[int, ...] = (4096,)
    limit: int | None = None
    seed: int = 42
    max_length: int | None = None
    batch_size: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)
    cache_dir: str = CACHE
    smoke: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "EvalConfig":
        """Check names and kinds of the values.

        Raises:
            ValueError: a name that is unknown or missing, or a value of the wrong kind.
        """
        known = {entry.name for entry in fields(cls)}
        given = {name: value for name, value in given.items() if value is not None}
        unknown, needed = set(given) - known, {"model", "tasks", "rows", "output"} - set(given)
        if unknown or needed:
            wrong = [f"unknown {', '.join(sorted(unknown))}"] * bool(unknown)
            wrong += [f"missing {', '.join(sorted(needed))}"] * bool(needed)
            raise ValueError(
                f"the configuration has {' and '.join(wrong)}; expected {', '.join(sorted(known))}"
            )
        values = dict(given)
        for name, kind in LISTS.items():
            if name in values:
                values[name] = _listed(name, values[name], kind)
        for name in ("data", "engine", "smoke"):
            if not isinstance(values.get(name) or {}, Mapping):
                raise ValueError(f"{name} is {values[name]!r}; expected names and values")
        config = cls(**values)
        config._check()
        return config

    def _check(self) -> None:
        for name, (is_right, expected) in EXPECTED.items():
            value = getattr(self, name)
            if value is not None and not is_right(value):
                raise ValueError(f"{name} is {value!r}; expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def table_rows(self) -> list[Row]:
        """The rows, the full cache first (errors: `locret.evaluation.rows.expand`)."""
        return expand(self.rows)

    def make_tasks(self) -> list[Task]:
        """The tasks, one for each length where they are made to a length.

        Raises:
            ValueError: an unknown task, or a data file or package that is not there.
        """
        kinds = [TASKS[name] for name in task_names(self.tasks)]
        made = [kind(self._settings(length)) for kind in kinds for length in self.lengths]
        by_label = {task.label: task for task in made}
        for task in by_label.values():
            task.files()
            task.check_packages()
        return list(by_label.values())

    def _settings(self, length: int) -> TaskSettings:
        return TaskSettings(
            data_dir=Path(self.data_dir).expanduser() if self.data_dir else None,
            data=dict(self.data),
            length=length,
            seed=self.seed,
            cache_dir=Path(self.cache_dir).expanduser(),
        )


def _listed(name: str, value: Any, kind: Any) -> tuple[Any, ...]:
    entries = [value] if isinstance(value, kind) else value
    right = isinstance(entries, (list, tuple)) and all(isinstance(e, kind) for e in entries)
    if not right or not entries:
        raise ValueError(f"{name} is {value!r}; expected a list of {KINDS[kind]}, at least one")
    return tuple(entries)


def find_config(name: str) -> Path:
    """The file of this name: the user's own, or one in configs/eval/ or configs/.

    Raises:
        ValueError: no such file; lists the configurations there are.
    """
    return files.find_config(name, ("eval", "."))


def read_config(name: str, overrides: Mapping[str, Any]) -> EvalConfig:
    """The configuration of a file, with values replaced; `a.b` names a value within `a`.

    Raises:
        ValueError: no such file, no YAML, or values that are none (`EvalConfig.from_dict`).
    """
    path = find_config(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no names and values")
    return EvalConfig.from_dict(overridden(values, overrides))


def overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with others in their place; `a.b` names a value within `a`."""
    result = dict(values)
    for name, value in overrides.items():
        outer, _, inner = name.partition(".")
        if inner and not isinstance(result.get(outer) or {}, Mapping):
            raise ValueError(f"{name}: {outer} is {result[outer]!r}, and has no values by name")
        result[outer] = overridden(result.get(outer) or {}, {inner: value}) if inner else value
    return result
