"""Answers of one model under one row of the table: compress the context, read the rest, generate.

Decoding is greedy. Every question meets a cache of its own or an untouched copy of its context's.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.engine.engine import Engine
from locret.evaluation.engines import Engines
from locret.evaluation.held import held_of
from locret.evaluation.padding import padded
from locret.evaluation.questions import Question
from locret.evaluation.records import Record
from locret.evaluation.stopping import StopStrings, before_stop
from locret.model.loading import LoadedModel


class Asker:
    """Asks a model questions under any row.

    Args:
        loaded: the model.
        engines: of the model.
        in_turn: questions of a batch are about one context, and are asked one after the other.
    """

    def __init__(self, loaded: LoadedModel, engines: Engines, in_turn: bool = True) -> None:
        self.loaded = loaded
        self.model: Any = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.engines = engines
        self._in_turn = in_turn

    @torch.no_grad()
    def ask(self, batch: Sequence[Question]) -> Iterator[list[Record]]:
        """Answer a batch (`locret.evaluation.questions.batches`), a list of records at a time."""
        engine = self.engines.get(batch[0].row, batch[0].budget)
        started = time.perf_counter()
        with engine:
            if not self._in_turn:
                cache, held = self._read(engine, batch)
                yield self._answers(engine, batch, cache, held, started)
                return
            cache, held = self._read(engine, batch[:1])
            untouched = cache.snapshot()
            for question in batch:
                cache.restore(untouched)
                yield self._answers(engine, [question], cache, held, started)
                started = time.perf_counter()

    def _read(
        self, engine: Engine, batch: Sequence[Question]
    ) -> tuple[RetainedCache, list[dict[str, Any]]]:
        """The compressed contexts, and what is held of each."""
        contexts = [question.prompt.ids[: question.compressed] for question in batch]
        ids, mask = padded(contexts, self.model.device)
        given: dict[str, Any] = {"attention_mask": mask}
        if batch[0].query:
            queries = [question.query for question in batch]
            given["query_ids"] = torch.tensor(queries, device=self.model.device)
        cache = engine.prefill(ids, **given)
        return cache, [held_of(cache, row, len(batch)) for row in range(len(batch))]

    def _answers(
        self,
        engine: Engine,
        batch: Sequence[Question],
        cache: RetainedCache,
        held: list[dict[str, Any]],
        started: float,
    ) -> list[Record]:
        parts = _parts(batch, engine.asks_together)
        answers: dict[int, tuple[Tensor, int]] = {}
        for rows in parts:
            part = cache if len(parts) == 1 else cache.rows(rows)
            new = self._generated(engine, [batch[row] for row in rows], part)
            bytes_after = part.nbytes // len(rows)
            answers |= {row: (new[at], bytes_after) for at, row in enumerate(rows)}
        seconds = round((time.perf_counter() - started) / len(batch), 4)
        records = []
        for row, question in enumerate(batch):
            new, bytes_after = answers[row]
            after = {"bytes_after": bytes_after, "seconds": seconds}
            records.append(self._record(question, new, held[row] | after))
        return records

    def _generated(self, engine: Engine, batch: Sequence[Question], cache: RetainedCache) -> Tensor:
        """The new tokens [B, n]."""
        task = batch[0].task
        rest = [question.prompt.ids[question.compressed :] for question in batch]
        ids, mask = padded(rest, self.model.device)
        criteria = [StopStrings(task.stop, self.tokenizer)] if task.stop else []
        output = engine.generate(
            ids,
            mask,
            cache=cache,
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            stopping_criteria=criteria,
            **self._ends(),
        )
        return output[:, ids.shape[1] :]

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
            budget=question.units_allowed,
            **held,
        )


def _parts(batch: Sequence[Question], together: bool) -> list[list[int]]:
    """Rows that are asked together: all, or those with as many tokens to read."""
    if together:
        return [[*range(len(batch))]]
    parts: dict[int, list[int]] = {}
    for row, question in enumerate(batch):
        parts.setdefault(question.rest, []).append(row)
    return [*parts.values()]
