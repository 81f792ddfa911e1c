"""Needle in a haystack, under several policies at the same budget.

The question comes after the context was compressed (query-agnostic): the prompt's last tokens, the
question and the start of the answer, are local. As in RULER, the answer's first words are given, so
that what is measured is retrieval and not manners.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from locret.evaluation.synthetic import SyntheticSample, make_sample, prompt_text
from locret.generation import Engine
from locret.heads import RetainingHeads
from locret.models import LoadedModel

MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class NeedleSettings:
    """What is asked.

    Attributes:
        task: a task of `locret.evaluation.synthetic.TASKS`.
        tokens: length of the prompt's text.
        count: how many needles; their depths are spread evenly.
        ratio: prompt tokens for every unit of the budget.
        seed: of the first sample; the others follow.
        haystack: "noise", a text file, or None for CPython's language reference.
        chunk_size: tokens read at a time.
        local_tokens: tokens of the prompt read after the compression.
    """

    task: str = "niah_single"
    tokens: int = 3000
    count: int = 10
    ratio: int = 8
    seed: int = 1_000_000
    haystack: str | None = "noise"
    chunk_size: int = 512
    local_tokens: int = 100


@dataclass(frozen=True)
class NeedleResult:
    """One needle under one policy: `units` in each KV head and real `bytes` after the answer."""

    policy: str
    depth: float
    found: bool
    answer: str
    expected: tuple[str, ...]
    units: int
    bytes: int
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True)
class PolicySummary:
    """A policy over all needles. `of_full`: found among those that the full cache finds."""

    policy: str
    found: int
    of_full: int
    count: int
    units: int
    bytes: int
    seconds: float


def needle_prompt(sample: SyntheticSample, tokenizer: Any) -> Tensor:
    """[1, n] long: the chat prompt of a sample, up to the first words of its answer."""
    messages = [{"role": "user", "content": prompt_text(sample)}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text + sample.answer_prefix, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids], dtype=torch.long)


def run_needles(
    loaded: LoadedModel,
    policies: Sequence[str],
    settings: NeedleSettings,
    heads: RetainingHeads | None = None,
) -> Iterator[NeedleResult]:
    """Ask every needle under every policy, one result at a time.

    Raises:
        ValueError: an unknown policy or task, or the policy "locret" without heads.
    """
    samples = [
        make_sample(
            settings.task,
            settings.tokens,
            loaded.tokenizer,
            settings.seed + i,
            depth=(i + 0.5) / settings.count,
            haystack=settings.haystack,
        )
        for i in range(settings.count)
    ]
    engines = {
        policy: Engine(
            loaded.model,
            policy,
            heads=heads,
            budget=settings.tokens // settings.ratio,
            chunk_size=settings.chunk_size,
            local_tokens=settings.local_tokens,
        )
        for policy in policies
    }
    for policy, engine in engines.items():
        for sample in samples:
            yield _ask(loaded, policy, engine, sample)


def _ask(loaded: LoadedModel, policy: str, engine: Engine, sample: SyntheticSample) -> NeedleResult:
    ids = needle_prompt(sample, loaded.tokenizer).to(loaded.model.device)
    started = time.perf_counter()
    output = engine.generate(
        ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    seconds = time.perf_counter() - started
    tokenizer: Any = loaded.tokenizer
    answer = tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    held = output.past_key_values.report()
    assert sample.depth is not None
    return NeedleResult(
        policy=policy,
        depth=sample.depth,
        found=sample.score(answer) == 1.0,
        answer=answer,
        expected=sample.expected,
        units=max(held["units"]),
        bytes=held["total_bytes"],
        prompt_tokens=ids.shape[1],
        seconds=seconds,
    )


def summarize(results: Iterable[NeedleResult]) -> list[PolicySummary]:
    """One row a policy, in the order in which they ran."""
    by_policy: dict[str, list[NeedleResult]] = {}
    for result in results:
        by_policy.setdefault(result.policy, []).append(result)
    full = {r.depth for r in by_policy.get("full", []) if r.found}
    return [
        PolicySummary(
            policy=policy,
            found=sum(r.found for r in rows),
            of_full=sum(r.found and r.depth in full for r in rows),
            count=len(rows),
            units=max(r.units for r in rows),
            bytes=max(r.bytes for r in rows),
            seconds=sum(r.seconds for r in rows),
        )
        for policy, rows in by_policy.items()
    ]


def as_table(summaries: Sequence[PolicySummary]) -> str:
    """A plain-text table of the rows."""
    full = next((row.found for row in summaries if row.policy == "full"), None)
    lines = [f"{'policy':<15}{'found':>8}{'of full':>9}{'units':>8}{'MiB':>8}{'seconds':>9}"]
    for row in summaries:
        of_full = "-" if full is None else f"{row.of_full}/{full}"
        lines.append(
            f"{row.policy:<15}{f'{row.found}/{row.count}':>8}{of_full:>9}{row.units:>8}"
            f"{row.bytes / 2**20:>8.1f}{row.seconds:>9.1f}"
        )
    return "\n".join(lines)


def as_json(settings: NeedleSettings, results: Sequence[NeedleResult]) -> dict[str, Any]:
    """Settings, rows and every single answer."""
    return {
        "settings": asdict(settings),
        "summary": [asdict(row) for row in summarize(results)],
        "results": [asdict(result) for result in results],
    }
