"""What there is to ask in a run: every sample under every setup, dealt into batches.

Everything that can be checked without the model is checked here.

Batches are a function of the configuration alone, whatever was answered before, so that all
processes of a run, and a run that goes on, agree on who asks what.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
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
    ("setups", "only", "full", "tasks", "output", "batch_size", "limit", "lengths", "depths")
    + ("max_length", "smoke", "cache_dir", "device", "adapter", "heads", "data_dir", "data")
    + ("engine", "model_config")
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
    those of this setup and task alone (`sources`, by content), so that others may come and go."""
    engine = {**config.engine, **setup.engine}
    quotas = quotas_of(_quotas_file(config, setup))
    if quotas is not None:  # by the numbers in their file
        engine["quotas"] = quotas.tables
    values = {
        "config": {k: v for k, v in config.to_dict().items() if k not in NOT_OF_ANSWERS},
        "sources": {**sources, "heads": _heads_of(setup, sources["heads"], config.heads)},
        "setup": setup.to_dict() | {"engine": engine, "heads": None},
        "task": [task.name, task.length, task.version, task.max_new_tokens, list(task.stop)],
    }
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def _questions(
    config: EvalConfig,
    setup: Setup,
    task: Task,
    rendered: Callable[[int | None], list[tuple[Sample, Prompt]]],
    sources: dict[str, Any],
    window: int | None,
) -> Iterator[Question]:
    """The samples of a task under a setup.

    Args:
        rendered: given a limit of tokens, the task's samples with their prompts.
        sources: what model, adapter, heads and this task's data are, by content.
        window: of the model.
    """
    settings, budget = settings_of(config, setup, task, sources), setup.engine_budget(task.length)
    # The window is the limit where every token keeps a position of its own.
    own = setup.keeps_all or {**config.engine, **setup.engine}.get("positions") == "original"
    longest = config.max_length or (window if own else None)
    limit = None if longest is None else longest - task.max_new_tokens
    for sample, prompt in rendered(limit):
        yield Question(setup, task, sample, prompt, budget, settings)


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
    if batch_size == 1:
        return [*groups.values()]
    by_length = (
        sorted(group, key=lambda question: question.compressed) for group in groups.values()
    )
    return [
        group[start : start + batch_size]
        for group in by_length
        for start in range(0, len(group), batch_size)
    ]


def share(all_batches: list[list[Question]], rank: int, world: int) -> list[list[Question]]:
    """The batches of one process of many: alike in number and length."""

    def cost(batch: list[Question]) -> int:
        new = sum(question.rest + question.task.max_new_tokens for question in batch)
        return batch[0].compressed + new

    return sorted(all_batches, key=cost, reverse=True)[rank::world]


@dataclass(frozen=True)
class Prepared:
    """A run, ready to be asked.

    Attributes:
        config: of the run.
        heads: by the name that a setup or the run gives them.
        sources: what model, adapter, heads and data are, by content.
        asked: all questions, in the order of the table.
    """

    config: EvalConfig
    heads: dict[str, RetainingHeads]
    sources: dict[str, Any]
    asked: list[Question]

    @property
    def output(self) -> Path:
        return Path(self.config.output)


def prepare(config: EvalConfig) -> Prepared:
    """Check everything that can be checked without the model, and make the questions; ValueError
    for unknown tasks, setups that cannot be, missing data or heads, an adapter of another model, or
    a device that is not there."""
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
        prompts.append(cache(partial(_rendered, samples, renderer)))
    asked = [
        question
        for setup in setups
        for task, rendered in zip(tasks, prompts, strict=True)
        for question in _questions(
            config, setup, task, rendered, sources | {"data": data[task.label]}, window
        )
    ]
    sources["data"] = dict(sorted(pair for hashes in data.values() for pair in hashes.items()))
    quotas = filter(None, (_quotas_file(config, setup) for setup in setups))
    sources["quotas"] = {path: file_hash(Path(path)) for path in sorted(set(quotas))}
    return Prepared(config, heads, sources, asked)


def _rendered(
    samples: Sequence[Sample], renderer: Renderer, limit: int | None
) -> list[tuple[Sample, Prompt]]:
    return [(sample, renderer.render(sample, limit)) for sample in samples]


def changes_of(given: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Values for a model's config, those given by name put into its own; ValueError for a value
    that it does not have."""
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
    """Refuse an adapter that is not there or, given the config of a model, is not one of it
    (ValueError of `locret.model.adapters`)."""
    adapter = Adapter.find(name) if name else None
    if adapter and model is not None:
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


def _sources(
    config: EvalConfig, heads: dict[str, RetainingHeads], renderer: Renderer
) -> dict[str, Any]:
    on = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    content = file_revision(config.model)
    brought = ("defaults", "positions", "longrope")  # engine settings that heads bring with them
    return {
        "model": config.model,
        **({} if content is None else {"revision": content}),
        "dtype": config.dtype if config.dtype != "auto" else f"auto on {on.partition(':')[0]}",
        "adapter": source(config.adapter),
        "heads": {
            name: (source(name) or {})
            | {"records": {of: getattr(own.config, of) for of in brought}}
            for name, own in heads.items()
        },
        "tokenizer": renderer.fingerprint,
    }
