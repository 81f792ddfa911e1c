"""Answers of one model: questions are dealt into batches, a setup's engine compresses the context,
reads the rest and generates.

Batches are a function of the configuration alone, whatever was answered before, so that all
processes of a run, and a run that goes on, agree on who asks what. Decoding is greedy. Every
question meets a cache of its own or an untouched copy of its context's.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from locret.cache.cache import RetainedCache
from locret.cache.merging import describe_merging
from locret.engine.arguments import end_tokens, filler, padded
from locret.engine.engine import Engine
from locret.evaluation.config import Setup, are_query_aware
from locret.evaluation.questions import Question
from locret.evaluation.records import OUT_OF_MEMORY, Record
from locret.heads.heads import RetainingHeads
from locret.model.loading import LoadedModel
from locret.quantities import Budget, ByteShare, Memory

# ---- batches -------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> "Ranks":
        """As torchrun and accelerate say it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def device(self, wanted: str | None = None) -> str | None:
        """The device that was asked for; of several processes each takes an accelerator in turn.
        None = the default, also where accelerators are asked for and there are none."""
        on_cuda = wanted is None or wanted.startswith("cuda")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not on_cuda or (count and self.world == 1):
            return wanted
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        return f"cuda:{local % count}" if count else None

    def share(self, all_batches: list[list[Question]]) -> list[list[Question]]:
        """The batches of this process: alike in number and length."""

        def cost(batch: list[Question]) -> int:
            new = sum(question.rest + question.task.max_new_tokens for question in batch)
            return batch[0].compressed + new

        return sorted(all_batches, key=cost, reverse=True)[self.rank :: self.world]


# ---- engines -------------------------------------------------------------------------------------

SHOWN = ("chunk_size", "stabilizers", "positions", "budget", "query_aware", "backend", "graphs")
"""Settings of an engine that are told beside figures."""


class Engines:
    """Engines for one model; the latest is kept.

    Args:
        heads: by the name that a setup or the run gives them; `default_heads` is the run's.
        settings: of the engine, for all setups.
        chat: prompts are in the tokenizer's chat template, if it has one.

    Attributes:
        used: settings of the first engine of every setup, by the setup's label.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        heads: Mapping[str, RetainingHeads],
        default_heads: str | None,
        settings: Mapping[str, Any],
        chat: bool = True,
    ) -> None:
        model = self._model = loaded.model
        self._tokenizer, self._chat = loaded.tokenizer, chat
        self._heads = {n: h.to(model.device, model.dtype) for n, h in heads.items()}
        self._default_heads = default_heads
        self._settings = settings
        self._latest: tuple[Any, Engine] | None = None
        self.used: dict[str, dict[str, Any]] = {}

    def get(self, setup: Setup, budget: Budget) -> Engine:
        """The engine of a setup, attached to nothing until it is used."""
        key = (setup.label, budget)
        if self._latest is None or self._latest[0] != key:
            made = self._made(setup, budget)
            self._latest = key, made
            self.used.setdefault(setup.label, _shown(made))
        return self._latest[1]

    def _made(self, setup: Setup, budget: Budget) -> Engine:
        heads = self._heads.get(setup.heads or self._default_heads or "")
        settings = setup.engine_settings(self._settings, budget)
        if setup.protocol == "query_aware" and not setup.keeps_all:
            settings["query_aware"] = not are_query_aware(setup, heads)
        policy = setup.engine_policy(self._tokenizer, self._chat)
        return Engine(self._model, policy, heads=heads, **settings)


def _shown(engine: Engine) -> dict[str, Any]:
    """What the engine's settings came to be."""
    config, settings = engine.config, engine.config.flat()
    shown = {name: settings[name] for name in SHOWN}
    if isinstance(config.reading.budget, Memory | ByteShare):
        shown["budget"] = str(config.reading.budget)
    shown |= {"merging": describe_merging(config.storage.merging)}
    if engine.policy.rereads:  # the budget does not bound what is held while a context is read
        shown |= {"rereads": True}
    return shown | ({"recall": asdict(config.storage.recall)} if config.storage.recall else {})


def sizes_of(cache: RetainedCache, row: int, rows: int) -> dict[str, Any]:
    """Units and bytes of one row, by the names that `locret.evaluation.records.Record` gives
    them."""
    report = cache.report()
    tails = [layer.store.tail for layer in cache.layers]
    counts = [layer.store.sequences.counts[row] for layer in cache.layers]
    units = [sum(heads) / len(heads) for heads in counts]
    unequal = any(len(set(heads)) > 1 for heads in counts)
    return {
        "units": (round(sum(units) / len(units), 1), round(max(units))),
        "head_units": (min(map(min, counts)), max(map(max, counts))) if unequal else None,
        "bytes": report["total_bytes"] // rows,
        # Of slots that a growing layer has taken ahead: they hold numbers as they come.
        "room_bytes": sum(t.nbytes - sum(x.nbytes for x in t) for t in tails) // rows,
        "full_bytes": report["full_cache_bytes"] // rows,
    }


# ---- answers -------------------------------------------------------------------------------------

LOOK_BACK = 16  # tokens whose text can hold the end of a stop string


class Asker:
    """Asks a model questions under any setup. `in_turn`: those of a batch are about one context,
    and are asked one after the other."""

    def __init__(self, loaded: LoadedModel, engines: Engines, in_turn: bool = True) -> None:
        self.loaded = loaded
        self.model: Any = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.engines = engines
        self._end_tokens = end_tokens(self.model, self.tokenizer)
        self._in_turn = in_turn

    def ask(self, batch: Sequence[Question]) -> Iterator[list[Record]]:
        """Answer a batch (`batches`), a list of records at a time. One
        that does not fit into the device's memory is asked by halves."""
        answered = 0
        try:
            for records in self._asked(batch):
                answered += len(records)
                yield records
            return
        except torch.OutOfMemoryError:
            pass  # the failed call's tensors are let go before the halves are asked
        torch.cuda.empty_cache()
        left = batch[answered:]
        if len(left) == 1:
            yield [_without_answer(left[0])]
            return
        middle = len(left) // 2
        yield from self.ask(left[:middle])
        yield from self.ask(left[middle:])

    @torch.no_grad()
    def _asked(self, batch: Sequence[Question]) -> Iterator[list[Record]]:
        engine = self.engines.get(batch[0].setup, batch[0].budget)
        started = time.perf_counter()
        with engine:
            if not self._in_turn:
                cache, sizes = self._read(engine, batch)
                yield self._answers(engine, batch, cache, sizes, started)
                return
            cache, sizes = self._read(engine, batch[:1])
            untouched = cache.snapshot()
            for question in batch:
                cache.restore(untouched)
                yield self._answers(engine, [question], cache, sizes, started)
                started = time.perf_counter()

    def _read(
        self, engine: Engine, batch: Sequence[Question]
    ) -> tuple[RetainedCache, list[dict[str, Any]]]:
        """The compressed contexts, and what the cache holds of each."""
        contexts = [question.prompt.ids[: question.compressed] for question in batch]
        ids, mask = padded(contexts, self.model.device)
        given: dict[str, Any] = {"attention_mask": mask}
        if batch[0].query:
            queries = [question.query for question in batch]
            given["query_ids"] = torch.tensor(queries, device=self.model.device)
        cache = engine.prefill(ids, **given)
        return cache, [sizes_of(cache, row, len(batch)) for row in range(len(batch))]

    def _answers(
        self,
        engine: Engine,
        batch: Sequence[Question],
        cache: RetainedCache,
        sizes: list[dict[str, Any]],
        started: float,
    ) -> list[Record]:
        groups = _asked_together(batch, engine.asks_together)
        answers: dict[int, tuple[Tensor, int]] = {}
        for rows in groups:
            of_group = cache if len(groups) == 1 else cache.rows(rows)
            new = self._generated(engine, [batch[row] for row in rows], of_group)
            bytes_after = of_group.nbytes // len(rows)
            answers |= {row: (new[at], bytes_after) for at, row in enumerate(rows)}
        seconds = round((time.perf_counter() - started) / len(batch), 4)
        records = []
        for row, question in enumerate(batch):
            new, bytes_after = answers[row]
            after = {"bytes_after": bytes_after, "seconds": seconds}
            records.append(self._record(question, new, sizes[row] | after))
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
        pad = filler(self.model, self.tokenizer)
        return {"eos_token_id": self._end_tokens or None, "pad_token_id": pad}

    def _record(self, question: Question, new: Tensor, sizes: dict[str, Any]) -> Record:
        tokens, ends = new.tolist(), set(self._end_tokens)
        length = next((i for i, token in enumerate(tokens) if token in ends), None)
        tokens = tokens[:length]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        answer, stopped = before_stop(text, question.task.stop)
        return Record(
            **_of_question(question),
            answer=answer,
            end="stop" if stopped else "length" if length is None else "eos",
            new_tokens=len(tokens),
            **sizes,
        )


def _of_question(question: Question) -> dict[str, Any]:
    """What is known of a record before there is an answer."""
    return {
        "settings": question.settings,
        "prompt": question.prompt.key,
        "setup": question.setup.label,
        "task": question.task.label,
        "sample": question.sample.id,
        "prompt_tokens": len(question.prompt.ids),
        "compressed_tokens": question.compressed,
        "cut": question.prompt.cut,
        "answer_cut": question.prompt.answer_cut,
        "budget": question.units_allowed,
    }


def _without_answer(question: Question) -> Record:
    return Record(
        **_of_question(question),
        answer="",
        end=OUT_OF_MEMORY,
        new_tokens=0,
        units=(0.0, 0),
        bytes=0,
        full_bytes=0,
        bytes_after=0,
        seconds=0.0,
    )


def _asked_together(batch: Sequence[Question], together: bool) -> list[list[int]]:
    """Rows that are asked in one call: all, or those with as many tokens to read."""
    if together:
        return [[*range(len(batch))]]
    groups: dict[int, list[int]] = {}
    for row, question in enumerate(batch):
        groups.setdefault(question.rest, []).append(row)
    return [*groups.values()]


class StopStrings(StoppingCriteria):
    """Ends a row once one of the strings stands in what was generated.

    White space before the answer's first word ends nothing: models begin with line breaks.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        self._start: int | None = None  # of the answer: the first call comes after its first token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._start is None:
            self._start = input_ids.shape[1] - 1
        answers = input_ids[:, self._start :]
        first = max(0, answers.shape[1] - LOOK_BACK)
        ended = [
            any(string in text for string in self.strings)
            for text in map(self._text, answers, [first] * len(answers))
        ]
        return torch.tensor(ended, device=input_ids.device)

    def _text(self, answer: Tensor, first: int) -> str:
        tail = self.tokenizer.decode(answer[first:], skip_special_tokens=True)
        return tail if first else tail.lstrip()


def before_stop(text: str, strings: Sequence[str]) -> tuple[str, bool]:
    """The answer before the first stop string, and whether one was there."""
    text = text.lstrip()
    places = [place for place in map(text.find, strings) if place >= 0]
    return text[: min(places, default=len(text))].rstrip(), bool(places)
