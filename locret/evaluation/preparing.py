"""Everything of a run that can be checked and made without its model: setups, tasks, questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locret.evaluation.config import EvalConfig
from locret.evaluation.engines import are_query_aware, check_setup
from locret.evaluation.prompts import Renderer
from locret.evaluation.provenance import source
from locret.evaluation.questions import Prompts, Question, questions
from locret.evaluation.setups import Setup
from locret.heads.heads import RetainingHeads
from locret.model.adapters import Adapter
from locret.model.loading import file_revision, find_device, load_config, load_tokenizer
from locret.policies import LocretPolicy
from locret.system.files import file_hash
from locret.tasks import Task


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
    data = {task.label: _hashes(task) for task in tasks}
    sources = _sources(config, heads, renderer)
    window = getattr(model, "max_position_embeddings", None)
    prompts = []
    for task in tasks:
        samples = task.samples(config.limit, renderer)
        if not samples:
            files = ", ".join(map(str, task.files())) or "no file"
            raise ValueError(f"task {task.label} has no samples: there are none in {files}")
        prompts.append(Prompts(samples, renderer, task.max_new_tokens, config.max_length, window))
    asked = [
        question
        for setup in setups
        for task, of_task in zip(tasks, prompts, strict=True)
        for question in questions(
            config, setup, task, of_task, sources | {"data": data[task.label]}
        )
    ]
    sources["data"] = dict(sorted(pair for hashes in data.values() for pair in hashes.items()))
    return Prepared(config, heads, sources, renderer, asked)


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


def _hashes(task: Task) -> dict[str, str]:
    """The task's data files, by content."""
    return {path.name: file_hash(path) for path in task.files()}


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
