"""Answers of one model under one row of the table: compress the context, read the rest, generate.

Decoding is greedy. Every question meets a cache of its own or an untouched copy of its context's.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from locret.cache import RetainedCache
from locret.evaluation.questions import Question
from locret.evaluation.records import Record
from locret.evaluation.rows import Row
from locret.evaluation.stopping import StopStrings, before_stop
from locret.generation import Engine
from locret.heads import RetainingHeads
from locret.models import LoadedModel
from locret.policies import POLICIES, LocretPolicy, Policy

PADDED = hasattr(RetainedCache, "stack")
"""Whether the engine takes contexts of different lengths in one batch."""


class Asker:
    """Asks a model questions under any row.

    Args:
        loaded: the model.
        heads: by the name that a row or the run gives them.
        default_heads: the run's own.
        engine: settings of the engine for all rows.
        in_turn: questions of a batch are about one context, and are asked one after the other.

    Attributes:
        settings: of the first engine of every row that was asked, by the row's label.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        heads: Mapping[str, RetainingHeads],
        default_heads: str | None,
        engine: Mapping[str, Any],
        in_turn: bool = True,
    ) -> None:
        model = loaded.model
        self.loaded = loaded
        self.model: Any = model
        self.tokenizer: Any = loaded.tokenizer
        self._heads = {n: h.to(model.device, model.dtype) for n, h in heads.items()}
        self._default_heads = default_heads
        self._settings = engine
        self._in_turn = in_turn
        self._engine: tuple[Any, Engine] | None = None
        self.settings: dict[str, dict[str, Any]] = {}

    def engine(self, row: Row, budget: int | None) -> Engine:
        """The engine of a row, attached to nothing until it is used."""
        key = (row.label, budget)
        if self._engine is None or self._engine[0] != key:
            made = self._made(row, budget)
            self._engine = key, made
            self.settings.setdefault(row.label, _settings(made))
        return self._engine[1]

    def _made(self, row: Row, budget: int | None) -> Engine:
        heads = self._heads.get(row.heads or self._default_heads or "")
        settings: dict[str, Any] = {**self._settings, **row.engine, "budget": budget}
        if row.quantization is not None:
            settings["quantization"] = row.quantization
        return Engine(self.model, _policy(row), heads=heads, **settings)

    @torch.no_grad()
    def ask(self, batch: Sequence[Question]) -> Iterator[list[Record]]:
        """Answer a batch (`locret.evaluation.questions.batches`), a list of records at a time."""
        engine = self.engine(batch[0].row, batch[0].budget)
        started = time.perf_counter()
        with engine:
            if not self._in_turn:
                cache, held = self._read(engine, batch)
                yield self._answers(engine, batch, cache, held, started)
                return
            whole, held = self._read(engine, batch[:1])
            for number, question in enumerate(batch, start=1):
                last = number == len(batch)
                cache = whole if last else copy.deepcopy(whole)
                yield self._answers(engine, [question], cache, held, started)
                started = time.perf_counter()

    def _read(
        self, engine: Engine, batch: Sequence[Question]
    ) -> tuple[RetainedCache, dict[str, Any]]:
        """The compressed contexts, and what is held of each."""
        contexts = [question.prompt.ids[: question.compressed] for question in batch]
        ids, mask = _padded(contexts, self.model.device)
        given: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if batch[0].query:
            queries = [question.query for question in batch]
            given["query_ids"] = torch.tensor(queries, device=self.model.device)
        cache = engine.prefill(ids, **given)
        return cache, _held(cache, len(batch))

    def _answers(
        self,
        engine: Engine,
        batch: Sequence[Question],
        cache: RetainedCache,
        held: dict[str, Any],
        started: float,
    ) -> list[Record]:
        task = batch[0].task
        rest = [question.prompt.ids[question.compressed :] for question in batch]
        ids = torch.tensor(rest, device=self.model.device)
        criteria = [StopStrings(task.stop, self.tokenizer)] if task.stop else []
        output = engine.generate(
            ids,
            cache=cache,
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            stopping_criteria=criteria,
            **self._ends(),
        )
        seconds = (time.perf_counter() - started) / len(batch)
        held = held | {"bytes_after": cache.nbytes // len(batch), "seconds": round(seconds, 4)}
        return [
            self._record(question, answer[ids.shape[1] :], held)
            for question, answer in zip(batch, output, strict=True)
        ]

    def _ends(self) -> dict[str, Any]:
        """The end of the turn, and what a finished row of a batch is filled with."""
        ends = self.end_tokens
        pad = self.tokenizer.pad_token_id
        pad = ends[0] if pad is None and ends else pad
        return {"eos_token_id": ends or None, "pad_token_id": pad}

    @property
    def end_tokens(self) -> list[int]:
        """Tokens that end an answer: the model's, else the tokenizer's."""
        found = self.model.generation_config.eos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    def _record(self, question: Question, new: Tensor, held: dict[str, Any]) -> Record:
        tokens, ends = new.tolist(), set(self.end_tokens)
        length = next((i for i, token in enumerate(tokens) if token in ends), None)
        tokens = tokens[:length]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        answer, stopped = before_stop(text, question.task.stop)
        return Record(
            settings=question.settings,
            prompt=question.prompt.key,
            row=question.row.label,
            task=question.task.label,
            sample=question.sample.id,
            answer=answer,
            end="stop" if stopped else "length" if length is None else "eos",
            new_tokens=len(tokens),
            prompt_tokens=len(question.prompt.ids),
            compressed_tokens=question.compressed,
            cut=question.prompt.cut,
            answer_cut=question.prompt.answer_cut,
            budget=question.budget,
            **held,
        )


def _settings(engine: Engine) -> dict[str, Any]:
    """What the engine's settings came to be."""
    found = vars(engine) | vars(getattr(engine, "settings", object))
    names = ("chunk_size", "stabilizers", "local_tokens", "positions", "budget")
    return {name: found[name] for name in names if name in found}


def _policy(row: Row) -> str | Policy:
    if not row.policy_args or row.policy == LocretPolicy.name:
        return row.policy
    return POLICIES[row.policy](**row.policy_args)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, n], padded on the left, and their mask; None if no row is padded."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return ids, None
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _held(cache: RetainedCache, rows: int) -> dict[str, Any]:
    """Units of a head, their mean and largest number over layers, and bytes of one row."""
    report = cache.report()
    units = [int(units) for units in report["units"]]
    return {
        "units": (round(sum(units) / len(units), 1), max(units)),
        "bytes": report["total_bytes"] // rows,
        "full_bytes": report["full_cache_bytes"] // rows,
    }
