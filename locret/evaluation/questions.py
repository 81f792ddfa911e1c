"""What there is to ask in a run: every sample under every setup, dealt into batches.

Everything that can be checked without the model is checked here.

Batches are a function of the configuration alone, whatever was answered before, so that all
processes of a run, and a run that goes on, agree on who asks what.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locret.evaluation.config import EvalConfig
from locret.evaluation.prompts import Prompt, Renderer
from locret.evaluation.provenance import source
from locret.evaluation.setups import Setup, are_query_aware, check_setup
from locret.heads.heads import RetainingHeads
from locret.heads.quotas import quotas_of
from locret.model.adapters import Adapter
from locret.model.loading import file_revision, find_device, load_config, load_tokenizer
from locret.policies import LocretPolicy
from locret.quantities import Budget
from locret.system.files import file_hash
from locret.tasks import Sample, Task

NOT_OF_ANSWERS = frozenset(
    {
        "setups",
        "only",
        "full",
        "tasks",
        "output",
        "batch_size",
        "limit",
        "lengths",
        "depths",
        "max_length",
    }
    | {"smoke", "cache_dir", "device", "adapter", "heads", "data_dir", "data", "engine"}
    | {"model_config"}
)
"""Values of a configuration that are not recorded as they are: no answer depends on them, or the
prompt's tokens show them, or `settings_of` records their content."""


@dataclass(frozen=True)
class Question:
    """A sample under a setup.

    Attributes:
        budget: the engine's.
        settings: recognises everything that the answer depends on but the sample.
    """

    setup: Setup
    task: Task
    sample: Sample
    prompt: Prompt
    budget: Budget
    settings: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What its record is found by (`locret.evaluation.records.Record.key`)."""
        return self.settings, self.sample.id, self.prompt.key

    @property
    def compressed(self) -> int:
        """Tokens that are read and compressed before the rest."""
        return self.prompt.context_end

    @property
    def units_allowed(self) -> int | None:
        """Units that a KV head may keep of the context, on average; None = all, or what fits into
        a memory."""
        if isinstance(self.budget, float):
            return max(1, round(self.budget * self.compressed))
        if isinstance(self.budget, tuple):
            return round(sum(self.budget) / len(self.budget))
        return self.budget if isinstance(self.budget, int) else None

    @property
    def query(self) -> tuple[int, ...]:
        """What may be seen of the question while the context is compressed."""
        if self.setup.keeps_all or self.setup.protocol == "query_agnostic":
            return ()
        return self.prompt.ids[self.prompt.context_end : self.prompt.question_end]

    @property
    def rest(self) -> int:
        """Tokens that follow, and are not compressed."""
        return len(self.prompt.ids) - self.compressed

    @property
    def group(self) -> str:
        return self.sample.group or self.sample.id


def settings_of(config: EvalConfig, setup: Setup, task: Task, sources: dict[str, Any]) -> str:
    """Recognises everything that an answer depends on but the sample: of the run's heads and data
    those of this setup and task alone, so that others may come and go.

    Args:
        sources: what model, adapter, heads and this task's data are, by content.
    """
    values = {
        "config": {k: v for k, v in config.to_dict().items() if k not in NOT_OF_ANSWERS},
        "sources": {**sources, "heads": _heads_of(setup, sources["heads"], config.heads)},
        "setup": setup.to_dict() | {"engine": _engine_settings(config, setup), "heads": None},
        "task": [task.name, task.length, task.version, task.max_new_tokens, list(task.stop)],
    }
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _engine_settings(config: EvalConfig, setup: Setup) -> dict[str, Any]:
    """The settings of a setup's engine, quotas by the numbers in their file."""
    settings = {**config.engine, **setup.engine}
    quotas = quotas_of(_quotas_file(config, setup))
    return settings if quotas is None else settings | {"quotas": quotas.tables}


def _quotas_file(config: EvalConfig, setup: Setup) -> str | None:
    """The file that the setup's quotas come from; None = no file."""
    quotas = {**config.engine, **setup.engine}.get("quotas")
    return quotas if isinstance(quotas, str) and quotas != "auto" else None


def _heads_of(setup: Setup, sources: dict[str, Any], default: str | None) -> Any:
    """What of its heads a setup's answers depend on. An engine takes the settings that they record
    under every policy; the weights only where they rank."""
    found = sources.get(setup.heads or default or "")
    if found is None:
        return None
    ranks = setup.policy == LocretPolicy.name
    return found["records"], (found["sha256"] or found["source"]) if ranks else None


class Rendered:
    """The samples of a task, rendered once for all setups that need the same.

    Args:
        samples: of the task.
        renderer: of their prompts.
        new_tokens: that an answer may take.
        max_length: tokens of prompt and answer for every setup; None = no limit.
        window: tokens that the model can hold at once, for setups that are limited by them.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        renderer: Renderer,
        new_tokens: int,
        max_length: int | None,
        window: int | None,
    ) -> None:
        self._samples = samples
        self._renderer = renderer
        self._new_tokens = new_tokens
        self._max_length = max_length
        self._window = window
        self._prompts: dict[int | None, list[Prompt]] = {}

    def rendered(self, within_window: bool) -> list[tuple[Sample, Prompt]]:
        """Every sample with its prompt."""
        longest = self._max_length or (self._window if within_window else None)
        limit = None if longest is None else longest - self._new_tokens
        if limit not in self._prompts:
            self._prompts[limit] = [self._renderer.render(s, limit) for s in self._samples]
        return list(zip(self._samples, self._prompts[limit], strict=True))


def questions(
    config: EvalConfig,
    setup: Setup,
    task: Task,
    prompts: Rendered,
    sources: dict[str, Any],
) -> Iterator[Question]:
    """The samples of a task under a setup.

    Args:
        prompts: of the task.
        sources: what model, adapter, heads and this task's data are, by content.
    """
    settings = settings_of(config, setup, task, sources)
    for sample, prompt in prompts.rendered(_needs_window(config, setup)):
        yield Question(setup, task, sample, prompt, setup.engine_budget(task.length), settings)


def _needs_window(config: EvalConfig, setup: Setup) -> bool:
    """Whether every token keeps a position of its own, so that the model's window is the limit."""
    return setup.keeps_all or {**config.engine, **setup.engine}.get("positions") == "original"


def batches(asked: Iterable[Question], batch_size: int) -> list[list[Question]]:
    """Questions that one call can answer: of one setup, task and budget.

    With a batch size of 1, a batch is the samples about one context, which share its prefill. With
    a larger one, contexts may have any length; questions that the policy sees must be equally long.
    """
    groups: dict[tuple[Any, ...], list[Question]] = {}
    for question in asked:
        key: tuple[Any, ...] = (question.setup.label, question.task.label, question.budget)
        if batch_size == 1:
            key += (question.group, question.prompt.ids[: question.compressed], question.query)
        else:
            key += (len(question.query),)
        groups.setdefault(key, []).append(question)
    size = batch_size if batch_size > 1 else None
    return [batch for group in groups.values() for batch in _cut(group, size)]


def _cut(group: list[Question], size: int | None) -> Iterator[list[Question]]:
    if size is None:
        yield group
        return
    group = sorted(group, key=lambda question: question.compressed)
    for start in range(0, len(group), size):
        yield group[start : start + size]


def share(all_batches: list[list[Question]], rank: int, world: int) -> list[list[Question]]:
    """The batches of one process of many: alike in number and length."""
    by_cost = sorted(all_batches, key=_cost, reverse=True)
    return by_cost[rank::world]


def _cost(batch: list[Question]) -> int:
    new = sum(question.rest + question.task.max_new_tokens for question in batch)
    return batch[0].compressed + new


@dataclass(frozen=True)
class Prepared:
    """A run, ready to be asked.

    Attributes:
        config: of the run.
        heads: by the name that a setup or the run gives them.
        sources: what model, adapter, heads and data are, by content.
        renderer: of the prompts.
        asked: all questions, in the order of the table.
    """

    config: EvalConfig
    heads: dict[str, RetainingHeads]
    sources: dict[str, Any]
    renderer: Renderer
    asked: list[Question]

    @property
    def output(self) -> Path:
        return Path(self.config.output)


def prepare(config: EvalConfig) -> Prepared:
    """Check everything that can be checked without the model, and make the questions.

    Raises:
        ValueError: unknown tasks, setups that cannot be, missing data or heads, an adapter of
            another model, or a device that is not there; in one line.
    """
    find_device(config.device)
    setups, tasks = config.all_setups(), config.make_tasks()
    for setup in setups:
        check_setup(setup, config.engine)
    model = load_config(config.model)
    check_adapter(config.adapter, model)
    heads = _load_heads(config, setups)
    renderer = Renderer(load_tokenizer(config.model), config.chat_template, config.answer_prefix)
    data = {task.label: task.origins() for task in tasks}
    sources = _sources(config, heads, renderer)
    changes = changes_of(config.model_config, model)
    sources |= {"model_config": changes} if changes else {}
    own = getattr(model, "max_position_embeddings", None)
    window = changes.get("max_position_embeddings", own)
    prompts = []
    for task in tasks:
        samples = task.samples(config.limit, renderer)
        if not samples:
            files = ", ".join(map(str, task.files())) or "no file"
            raise ValueError(f"task {task.label} has no samples: there are none in {files}")
        prompts.append(Rendered(samples, renderer, task.max_new_tokens, config.max_length, window))
    asked = [
        question
        for setup in setups
        for task, of_task in zip(tasks, prompts, strict=True)
        for question in questions(
            config, setup, task, of_task, sources | {"data": data[task.label]}
        )
    ]
    sources["data"] = dict(sorted(pair for hashes in data.values() for pair in hashes.items()))
    quotas = filter(None, (_quotas_file(config, setup) for setup in setups))
    sources["quotas"] = {path: file_hash(Path(path)) for path in sorted(set(quotas))}
    return Prepared(config, heads, sources, renderer, asked)


def changes_of(given: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Values for a model's config, those given by name put into its own.

    Args:
        model: its config.

    Raises:
        ValueError: it has no value of that name.
    """
    unknown = [name for name in given if not hasattr(model, name)]
    if unknown:
        raise ValueError(
            f"model_config has {', '.join(unknown)}, which a config of {model.model_type} does not"
        )
    return {
        name: {**(getattr(model, name) or {}), **value} if isinstance(value, Mapping) else value
        for name, value in given.items()
    }


def check_adapter(name: str | None, model: Any = None) -> None:
    """Refuse an adapter that is not there, or not one of this model.

    Args:
        model: its config; None = any model will do.

    Raises:
        ValueError: see `locret.model.adapters`.
    """
    if name is None:
        return
    adapter = Adapter.find(name)
    if model is not None:
        adapter.check_fit(model)


def _load_heads(config: EvalConfig, setups: Sequence[Setup]) -> dict[str, RetainingHeads]:
    for setup in setups:
        if setup.policy == LocretPolicy.name and not (setup.heads or config.heads):
            raise ValueError(
                f"setup {setup.label} needs trained heads: give --heads, or heads in the "
                "configuration"
            )
    names = {name for name in (config.heads, *(setup.heads for setup in setups)) if name}
    heads = {name: RetainingHeads.from_pretrained(name) for name in sorted(names)}
    for setup in setups:
        own = heads.get(setup.heads or config.heads or "")
        if setup.protocol == "query_agnostic" and are_query_aware(setup, own):
            raise ValueError(
                f"setup {setup.label}: its heads are query-aware; give it protocol: query_aware"
            )
    return heads


def _recorded(heads: RetainingHeads) -> dict[str, Any]:
    """The engine settings that heads bring with them."""
    record = heads.config
    return {
        "defaults": dict(record.defaults),
        "positions": record.positions,
        "longrope": record.longrope,
    }


def _sources(
    config: EvalConfig, heads: dict[str, RetainingHeads], renderer: Renderer
) -> dict[str, Any]:
    on = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    content = file_revision(config.model)
    return {
        "model": config.model,
        **({} if content is None else {"revision": content}),
        "dtype": config.dtype if config.dtype != "auto" else f"auto on {on.partition(':')[0]}",
        "adapter": source(config.adapter),
        "heads": {
            name: (source(name) or {}) | {"records": _recorded(own)} for name, own in heads.items()
        },
        "tokenizer": renderer.fingerprint,
    }
