"""Needles in haystacks and their kin, under several policies at the same budgets.

The question comes after the context was compressed (query-agnostic): the prompt's last tokens, with
the question, are local. With `answer_prefix` the answer's first words are given, as in RULER, so
that what is measured is retrieval and not manners.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from locret.engine.engine import Engine
from locret.evaluation.held import bytes_without, held_of
from locret.evaluation.local_needles import is_local
from locret.evaluation.padding import padded
from locret.heads.heads import RetainingHeads
from locret.model.hooks import cache_of
from locret.model.loading import LoadedModel
from locret.policies import POLICIES
from locret.quantities import is_whole
from locret.tasks.synthetic import SyntheticSample, make_sample, prompt_text


@dataclass(frozen=True)
class NeedleSettings:
    """What is asked.

    Attributes:
        tasks: of `locret.tasks.synthetic.TASKS`.
        tokens: length of the prompt's text.
        count: how many samples a task; their depths are spread evenly.
        ratios: prompt tokens for every unit of the budget; each ratio is one run.
        seed: of the first sample; the others follow.
        haystack: "noise", a text file, or None for CPython's language reference.
        answer_prefix: give the answer's first words.
        chunk_size: tokens read at a time; None = the prompt at once.
        local_tokens: tokens of the prompt read after the compression.
        max_new_tokens: of an answer.

    Raises:
        ValueError: no task or ratio, or a number below 1.
    """

    tasks: tuple[str, ...] = ("niah_single",)
    tokens: int = 3000
    count: int = 10
    ratios: tuple[int, ...] = (8,)
    seed: int = 1_000_000
    haystack: str | None = "noise"
    answer_prefix: bool = True
    chunk_size: int | None = 512
    local_tokens: int = 100
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("tokens", "count", "max_new_tokens")}
        numbers |= {f"ratio {i + 1}": ratio for i, ratio in enumerate(self.ratios)}
        for name, value in numbers.items():
            if not is_whole(value, 1):
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        if not self.tasks or not self.ratios:
            raise ValueError(
                f"tasks are {self.tasks} and ratios {self.ratios}; expected at least one of each"
            )


@dataclass(frozen=True)
class NeedleResult:
    """One sample under one policy: `units` in each KV head and real `bytes` after the answer; of a
    batch, its share of bytes and seconds.

    `found`: every expected string is in the answer. `ratio` is 1 for a policy that keeps all.
    `needle_is_local`: no policy can evict it (`locret.evaluation.local_needles`). Of the prompt,
    `context_tokens` are compressed, to `context_units` and `context_bytes`; `rest_tokens` (local
    tokens with the question, answer) are kept as they are. `full_bytes`: keys and values of all.
    """

    policy: str
    ratio: int
    task: str
    seed: int
    depth: float | None
    found: bool
    answer: str
    expected: tuple[str, ...]
    units: int
    bytes: int
    prompt_tokens: int
    seconds: float
    needle_is_local: bool
    context_tokens: int
    context_units: int
    context_bytes: int
    rest_tokens: int
    full_bytes: int


@dataclass(frozen=True)
class PolicySummary:
    """A policy at a ratio, over all samples: the largest tokens, units and bytes of one.

    `of_full`: found among those that the full cache finds. `by_task`: share found. `local`: samples
    whose needles no policy can evict. `smaller`: bytes of the full cache for one of this cache; the
    full cache is the policy `full`, or if that did not run, the keys and values alone.
    """

    policy: str
    ratio: int
    found: int
    of_full: int
    count: int
    units: int
    bytes: int
    seconds: float
    by_task: dict[str, float]
    local: int
    context_tokens: int
    context_units: int
    context_bytes: int
    rest_tokens: int
    smaller: float


def needle_text(sample: SyntheticSample, tokenizer: Any, answer_prefix: bool) -> str:
    """The chat prompt of a sample, with the answer's first words if asked for."""
    messages = [{"role": "user", "content": prompt_text(sample)}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return f"{text}{sample.answer_prefix if answer_prefix else ''}"


def needle_prompt(sample: SyntheticSample, tokenizer: Any, answer_prefix: bool) -> Tensor:
    """[1, n] long: the tokens of `needle_text`."""
    text = needle_text(sample, tokenizer, answer_prefix)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids], dtype=torch.long)


def needle_is_local(sample: SyntheticSample, tokenizer: Any, settings: NeedleSettings) -> bool:
    """Whether a sample's needle is never evicted (`locret.evaluation.local_needles`)."""
    text = needle_text(sample, tokenizer, settings.answer_prefix)
    return is_local(sample, text, tokenizer, settings.local_tokens)


def make_samples(settings: NeedleSettings, tokenizer: Any) -> list[tuple[int, SyntheticSample]]:
    """The samples with their seeds, task after task.

    Raises:
        ValueError: an unknown task or haystack.
    """
    return [
        (
            settings.seed + i,
            make_sample(
                task,
                settings.tokens,
                tokenizer,
                settings.seed + i,
                depth=(i + 0.5) / settings.count,
                haystack=settings.haystack,
            ),
        )
        for task in settings.tasks
        for i in range(settings.count)
    ]


def runs(policies: Sequence[str], ratios: Sequence[int]) -> list[tuple[str, int]]:
    """Policies and ratios to run; a policy that keeps all runs once, at ratio 1."""
    return [
        (policy, ratio)
        for policy in policies
        for ratio in (ratios if POLICIES[policy].evicts else (1,))
    ]


def run_needles(
    loaded: LoadedModel,
    policies: Sequence[str],
    settings: NeedleSettings,
    heads: RetainingHeads | None = None,
    batch_size: int = 1,
) -> Iterator[NeedleResult]:
    """Ask every sample under every policy and ratio, `batch_size` at a time.

    Raises:
        ValueError: an unknown policy or task, or the policy "locret" without heads.
    """
    samples = make_samples(settings, loaded.tokenizer)
    for run in runs(policies, settings.ratios):
        engine = make_engine(loaded, run, settings, heads)
        for start in range(0, len(samples), batch_size):
            yield from ask(loaded, run, engine, samples[start : start + batch_size], settings)


def make_engine(
    loaded: LoadedModel,
    run: tuple[str, int],
    settings: NeedleSettings,
    heads: RetainingHeads | None = None,
) -> Engine:
    """The engine of one run: a policy and its ratio."""
    policy, ratio = run
    return Engine(
        loaded.model,
        policy,
        heads=heads,
        budget=settings.tokens // ratio,
        chunk_size=settings.chunk_size,
        local_tokens=settings.local_tokens,
    )


def ask(
    loaded: LoadedModel,
    run: tuple[str, int],
    engine: Engine,
    samples: Sequence[tuple[int, SyntheticSample]],
    settings: NeedleSettings,
) -> list[NeedleResult]:
    """Ask samples, which come with their seeds, together under one run."""
    tokenizer: Any = loaded.tokenizer
    prompts = [needle_prompt(s, tokenizer, settings.answer_prefix)[0].tolist() for _, s in samples]
    ids, mask = padded(prompts, loaded.model.device)
    started = time.perf_counter()
    output = engine.generate(
        ids,
        mask,
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    seconds = (time.perf_counter() - started) / len(samples)
    new = output.sequences[:, ids.shape[1] :]
    answers = tokenizer.batch_decode(new, skip_special_tokens=True)
    cache, results = cache_of(output), []
    for row, ((seed, sample), answer) in enumerate(zip(samples, answers, strict=True)):
        held = held_of(cache, row, len(samples))
        local = min(settings.local_tokens, len(prompts[row]))
        rest = local + new.shape[1] - 1  # the last token of an answer is not read
        results.append(
            NeedleResult(
                policy=run[0],
                ratio=run[1],
                task=sample.task,
                seed=seed,
                depth=sample.depth,
                found=sample.score(answer) == 1.0,
                answer=answer,
                expected=sample.expected,
                units=held["units"][1],
                bytes=held["bytes"],
                prompt_tokens=len(prompts[row]),
                seconds=seconds,
                needle_is_local=needle_is_local(sample, tokenizer, settings),
                context_tokens=len(prompts[row]) - local,
                context_units=max(held["units"][1] - rest, 0),
                context_bytes=bytes_without(cache, rest, len(samples)),
                rest_tokens=rest,
                full_bytes=held["full_bytes"],
            )
        )
    return results


def summarize(results: Iterable[NeedleResult]) -> list[PolicySummary]:
    """One row a policy and ratio, in the order in which they ran."""
    by_run: dict[tuple[str, int], list[NeedleResult]] = {}
    for result in results:
        by_run.setdefault((result.policy, result.ratio), []).append(result)
    whole = by_run.get(("full", 1), [])
    full = {(r.task, r.seed) for r in whole if r.found}
    full_bytes = max((r.bytes for r in whole), default=0)
    return [
        PolicySummary(
            policy=policy,
            ratio=ratio,
            found=sum(r.found for r in rows),
            of_full=sum(r.found and (r.task, r.seed) in full for r in rows),
            count=len(rows),
            units=max(r.units for r in rows),
            bytes=max(r.bytes for r in rows),
            seconds=sum(r.seconds for r in rows),
            by_task=_by_task(rows),
            local=sum(r.needle_is_local for r in rows),
            context_tokens=max(r.context_tokens for r in rows),
            context_units=max(r.context_units for r in rows),
            context_bytes=max(r.context_bytes for r in rows),
            rest_tokens=max(r.rest_tokens for r in rows),
            smaller=_smaller(rows, full_bytes),
        )
        for (policy, ratio), rows in by_run.items()
    ]


def _by_task(rows: Sequence[NeedleResult]) -> dict[str, float]:
    tasks = dict.fromkeys(row.task for row in rows)
    of_task = {task: [row.found for row in rows if row.task == task] for task in tasks}
    return {task: sum(found) / len(found) for task, found in of_task.items()}


def _smaller(rows: Sequence[NeedleResult], full_bytes: int) -> float:
    """How many times smaller the cache is than the full one."""
    full = full_bytes or max(row.full_bytes for row in rows)
    return full / max(1, *(row.bytes for row in rows))


def as_json(settings: NeedleSettings, results: Sequence[NeedleResult]) -> dict[str, Any]:
    """Settings, rows and every single answer."""
    return {
        "settings": asdict(settings),
        "summary": [asdict(row) for row in summarize(results)],
        "results": [asdict(result) for result in results],
    }
