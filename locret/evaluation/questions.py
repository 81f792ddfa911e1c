"""What there is to ask in a run: every sample as a prompt under every setup.

The whole prompt is tokenized at once and then cut, so that both protocols and a full cache read the
very same tokens. A token that reaches over a cut belongs to what follows.

Everything that can be checked without the model is checked here.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from locret.evaluation.config import EvalConfig, Setup, are_query_aware
from locret.heads.heads import RetainingHeads
from locret.heads.quotas import quotas_of
from locret.model.adapters import Adapter, warn_without
from locret.model.loading import file_revision, find_device, load_config, load_tokenizer
from locret.policies import LocretPolicy
from locret.quantities import Budget
from locret.system.files import file_hash, folder_hash
from locret.tasks import Sample, Task

# ---- prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: all of it.
        ids: its tokens.
        context_end: tokens before the question; at least one token comes after.
        question_end: tokens before the end of the user's turn; likewise.
        cut: tokens that were taken out of the context to fit a limit.
        answer_cut: an answer stood in what was taken out and stands in the context no more.
    """

    text: str
    ids: tuple[int, ...]
    context_end: int
    question_end: int
    cut: int = 0
    answer_cut: bool = False

    @cached_property
    def key(self) -> str:
        """Recognises the prompt's tokens and cuts."""
        cuts = f"{self.context_end} {self.question_end} "
        return hashlib.sha256((cuts + " ".join(map(str, self.ids))).encode()).hexdigest()[:16]


class Renderer:
    """Renders samples for one tokenizer.

    Args:
        tokenizer: a fast one: it must tell where its tokens stand in the text.
        chat: put the user's turn into the tokenizer's chat template.
        answer_prefix: let prompts end with the first words of the answer, where samples have them.

    Raises:
        ValueError: the tokenizer is no fast one, or has no chat template to apply.
    """

    def __init__(self, tokenizer: Any, chat: bool, answer_prefix: bool = True) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer is a {type(tokenizer).__name__}, which does not tell where its "
                "tokens stand in the text; a fast tokenizer is needed"
            )
        if chat and not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; set chat_template to false for raw prompts"
            )
        self.tokenizer = tokenizer
        self.chat = chat
        self.answer_prefix = answer_prefix

    @property
    def fingerprint(self) -> str:
        """Recognises the tokenizer and its template."""
        both = (
            self.tokenizer.backend_tokenizer.to_str(),
            str(self.chat and self.tokenizer.chat_template),
        )
        return hashlib.sha256("\n".join(both).encode()).hexdigest()[:16]

    def measure(self, sample: Sample) -> int:
        """Tokens of the rendered prompt."""
        text = self._text(sample)[0]
        return len(self._encode(text)["input_ids"])

    def render(self, sample: Sample, limit: int | None = None) -> Prompt:
        """The prompt of a sample, its context cut in the middle to fit `limit` tokens. ValueError
        if the chat template changes the user's text, or the limit leaves no room."""
        text, context_end, question_end = self._text(sample)
        encoded = self._encode(text, return_offsets_mapping=True)
        ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
        prompt = Prompt(
            text=text,
            ids=tuple(ids),
            context_end=min(_tokens_before(ends, context_end), len(ids) - 1),
            question_end=min(_tokens_before(ends, question_end), len(ids) - 1),
        )
        return prompt if limit is None else self._cut(prompt, sample, limit)

    def _text(self, sample: Sample) -> tuple[str, int, int]:
        """The text, and the characters at which context and question end."""
        turn = sample.context + sample.question
        prefix = sample.answer_prefix if self.answer_prefix else ""
        if not self.chat:
            text = turn + prefix
            return text, len(sample.context), len(turn)
        # Templates may strip the turn, so that it is stripped here.
        lead = len(turn) - len(turn.lstrip())
        turn = turn.strip()
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
        )
        start = text.find(turn)
        if start < 0:
            raise ValueError("the chat template changes the user's text: question cannot be found")
        context = max(0, min(len(sample.context) - lead, len(turn)))
        return text + prefix.lstrip(), start + context, start + len(turn)

    def _encode(self, text: str, **wanted: Any) -> Any:
        # verbose=False: a text above model_max_length is meant, and no reason for a warning.
        return self.tokenizer(text, add_special_tokens=not self.chat, verbose=False, **wanted)

    def _cut(self, prompt: Prompt, sample: Sample, limit: int) -> Prompt:
        over = len(prompt.ids) - limit
        if over <= 0:
            return prompt
        if over >= prompt.context_end:
            raise ValueError(
                f"sample {sample.id} has a prompt of {len(prompt.ids)} tokens, "
                f"{prompt.context_end} of them context; it cannot be cut to {limit} tokens: raise "
                "max_length"
            )
        start = (prompt.context_end - over) // 2
        ids = prompt.ids[:start] + prompt.ids[start + over :]
        left = self.tokenizer.decode(ids[: prompt.context_end - over]).casefold()
        lost = [a for a in sample.answers if a.casefold() in sample.context.casefold()]
        return Prompt(
            text=self.tokenizer.decode(ids),
            ids=ids,
            context_end=prompt.context_end - over,
            question_end=prompt.question_end - over,
            cut=over,
            answer_cut=any(answer.casefold() not in left for answer in lost),
        )


def _tokens_before(ends: list[int], character: int) -> int:
    """Tokens that end at or before a character."""
    return next((i for i, end in enumerate(ends) if end > character), len(ends))


# ---- questions -----------------------------------------------------------------------------------

NOT_OF_ANSWERS = frozenset(
    ("setups", "only", "full", "tasks", "output", "batch_size", "limit", "lengths", "depths")
    + ("max_length", "smoke", "cache_dir", "device", "adapter", "heads", "data_dir", "data")
    + ("engine", "model_config")
)
"""Values of a configuration that are not recorded as they are: no answer depends on them, or the
prompt's tokens show them, or `settings_of` records their content."""

CAME_LATER = frozenset(("weights",))
"""Values of a configuration that are recorded where they are given: answers from before there were
such values stay valid."""


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
        "config": _recorded(config),
        "sources": {**sources, "heads": _heads_of(setup, sources["heads"], config.heads)},
        "setup": setup.to_dict() | {"engine": engine, "heads": None},
        "task": [task.name, task.length, task.version, task.max_new_tokens, list(task.stop)],
    }
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _recorded(config: EvalConfig) -> dict[str, Any]:
    """The values that are recorded as they are."""
    values = {k: v for k, v in config.to_dict().items() if k not in NOT_OF_ANSWERS}
    return {k: v for k, v in values.items() if k not in CAME_LATER or v is not None}


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


# ---- a run, ready to be asked --------------------------------------------------------------------


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
        setup.check(config.engine)
    model = load_config(config.model)
    if config.adapter:
        Adapter.find(config.adapter).check_fit(model)
    heads = _load_heads(config, setups)
    renderer = Renderer(load_tokenizer(config.model), config.chat_template, config.answer_prefix)
    data = {task.label: task.origins() for task in tasks}
    sources = _sources(config, heads, renderer)
    changes = changes_of(config.model_config, model)
    sources |= {"model_config": changes} if changes else {}
    own = getattr(model, "max_position_embeddings", None)
    window = changes.get("max_position_embeddings", own)
    samples = {task.label: _samples(task, config.limit, renderer) for task in tasks}

    @cache
    def prompts(task: Task, limit: int | None) -> list[Prompt]:
        return [renderer.render(sample, limit) for sample in samples[task.label]]

    asked = []
    for setup, task in itertools.product(setups, tasks):
        settings = settings_of(config, setup, task, sources | {"data": data[task.label]})
        budget, limit = setup.engine_budget(task.length), _limit(config, setup, task, window)
        asked += [
            Question(setup, task, sample, prompt, budget, settings)
            for sample, prompt in zip(samples[task.label], prompts(task, limit), strict=True)
        ]
    sources["data"] = dict(sorted(pair for hashes in data.values() for pair in hashes.items()))
    quotas = filter(None, (_quotas_file(config, setup) for setup in setups))
    sources["quotas"] = {path: file_hash(Path(path)) for path in sorted(set(quotas))}
    return Prepared(config, heads, sources, asked)


def _samples(task: Task, limit: int | None, renderer: Renderer) -> list[Sample]:
    samples = task.samples(limit, renderer)
    if not samples:
        files = ", ".join(map(str, task.files())) or "no file"
        raise ValueError(f"task {task.label} has no samples: there are none in {files}")
    return samples


def _limit(config: EvalConfig, setup: Setup, task: Task, window: int | None) -> int | None:
    """Tokens of a prompt. The model's window is the limit where every token keeps a position of its
    own."""
    own = setup.keeps_all or {**config.engine, **setup.engine}.get("positions") == "original"
    longest = config.max_length or (window if own else None)
    return None if longest is None else longest - task.max_new_tokens


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


def _load_heads(config: EvalConfig, setups: Sequence[Setup]) -> dict[str, RetainingHeads]:
    for setup in setups:
        if setup.policy == LocretPolicy.name and not (setup.heads or config.heads):
            raise ValueError(
                f"setup {setup.label} needs trained heads: give --heads, or heads in the "
                "configuration"
            )
    names = {name for name in (config.heads, *(setup.heads for setup in setups)) if name}
    heads = {name: RetainingHeads.from_pretrained(name) for name in sorted(names)}
    for each in heads.values():
        warn_without(each, bool(config.adapter))
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


def source(name: str | None) -> dict[str, Any] | None:
    """What an adapter or heads were: the name, the commit on the Hub, the hash of the files."""
    if name is None:
        return None
    path = Path(name)
    if not path.exists():  # of the Hub, fetched before: in a folder named after its commit
        try:
            path = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            return {"source": name, "sha256": None}
    found = {"source": name, "sha256": folder_hash(path) if path.is_dir() else file_hash(path)}
    return found if path == Path(name) else found | {"revision": path.name}
