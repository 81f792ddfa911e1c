"""Requests that come while others are answered join them, and every answer is as it is alone."""

import functools
import gc

import pytest
import torch

import locret
from locret.cache.cache import RetainedCache
from locret.serve.contexts import Contexts
from locret.serve.requests import Ask as AnyAsk
from locret.serve.requests import Piece
from locret.serve.service import Service
from tests.serve.conftest import SMALL, WAIT, rows_of_calls, text_of
from tests.tiny_models import tiny_heads, tiny_model

LONG = 200  # tokens of an answer that others join

Ask = functools.partial(AnyAsk, ignore_eos=True)  # random models end when they like


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr("locret.serve.worker.STEPS", 3)


class Begun:
    """An answer that has begun: the events that came, and the rest."""

    def __init__(self, answer):
        self._events = answer.events(WAIT)
        self._first = next(self._events)
        assert isinstance(self._first, Piece)

    def text(self):
        *pieces, self.end = [self._first, *self._events]
        return "".join(piece.text for piece in pieces)


def test_prompts_join(make, ids, expected, batches):
    # Expected before the first answer comes, which is short for a busy machine.
    texts = {n: expected(ids(n, seed=n), new=n) for n in (3, 30, 50)}
    service = make()
    service.start()
    first = Begun(service.ask(Ask(ids(40), max_tokens=LONG)))
    later = [service.ask(Ask(ids(n, seed=n), max_tokens=n)) for n in texts]
    for n, answer in zip(texts, later, strict=True):
        text, end = text_of(answer)
        assert text == texts[n]
        assert end.usage.completion_tokens == end.usage.prompt_tokens == n
    assert first.text() == expected(ids(40), new=LONG)
    assert first.end.usage.completion_tokens == LONG
    assert max(batches) > 1 and batches[0] == 1
    assert service.counts.answered == 4


def test_rows_that_are_done_leave(make, ids, expected, batches):
    texts = [expected(ids(9, seed=n), new=5) for n in range(3)]  # before the first answer comes
    service = make()
    service.start()
    first = Begun(service.ask(Ask(ids(40), max_tokens=LONG)))
    for n, text in enumerate(texts):
        assert text_of(service.ask(Ask(ids(9, seed=n), max_tokens=5)))[0] == text
    assert first.text() == expected(ids(40), new=LONG)
    assert batches == [1, 1, 2, 1, 2, 1, 2]


def test_an_answer_that_repeats_a_prompt_of_one_token_joins(make, ids, expected, twin, recwarn):
    """To go on with it is not to ask again: nothing is warned of."""
    tokens = torch.arange(5, twin.model.config.vocab_size)
    with torch.no_grad():
        repeats = twin.model(tokens[:, None]).logits[:, -1].argmax(dim=-1) == tokens
    assert repeats.any()
    service = make()
    service.start()
    first = Begun(service.ask(Ask(ids(40), max_tokens=LONG)))
    for token in tokens[repeats].tolist():
        assert text_of(service.ask(Ask([token], max_tokens=6)))[0] == expected([token], new=6)
    assert first.text() == expected(ids(40), new=LONG)
    assert not recwarn.list


def test_questions_about_contexts_join(make, ids, expected, twin, batches):
    service = make(contexts=Contexts())
    service.start()
    infos = [service.read(ids(n)).result(WAIT) for n in (60, 9, 33)]
    first = Begun(service.ask(Ask(ids(4), infos[0].id, max_tokens=LONG)))
    later = [service.ask(Ask(ids(2 + n, seed=n), infos[n].id, max_tokens=6)) for n in range(3)]
    for n, answer in enumerate(later):
        cache = twin.prefill(torch.tensor([ids((60, 9, 33)[n])]))
        assert text_of(answer)[0] == expected(ids(2 + n, seed=n), cache, new=6)
    cache = twin.prefill(torch.tensor([ids(60)]))
    assert first.text() == expected(ids(4), cache, new=LONG)
    assert first.end.usage.cached_tokens == 60
    assert max(batches) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"positions": "original"},
        {"decode_interval": 4},
        {"quantization": {"name": "kivi", "bits": 4}},
        {"quantization": "rotated"},
        {"recall": {"block_size": 2, "blocks": 2, "representatives": 1}},
        {"merging": "similar"},
        {"budget": "4x"},
        {"query_aware": True},
        {"budget": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_engines_of_other_settings(tokenizer, ids, family, settings, monkeypatch):
    def engine():
        model = tiny_model(family, vocab_size=len(tokenizer))
        return locret.Engine(model, heads=tiny_heads(model), **SMALL | settings)

    def alone(tokens, new):
        output = by.generate(torch.tensor([tokens]), max_new_tokens=new, do_sample=False)
        return tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)

    by, own = engine(), engine()
    service, batches = Service(own, tokenizer), rows_of_calls(own, monkeypatch)
    service.start()
    first = Begun(service.ask(Ask(ids(50), max_tokens=LONG)))
    second = service.ask(Ask(ids(31, seed=1), max_tokens=6))
    assert text_of(second)[0] == alone(ids(31, seed=1), 6)
    assert first.text() == alone(ids(50), LONG)
    service.close(seconds=WAIT)
    assert service.counts.failed == 0
    assert max(batches) == (2 if own.asks_together else 1)


def test_one_that_fails_while_it_joins_fails_alone(make, engine, ids, expected, monkeypatch):
    service, generate = make(), engine.generate

    def broken(input_ids, *args, **kwargs):
        if input_ids.shape == (1, 9):
            raise ValueError("nine")
        return generate(input_ids, *args, **kwargs)

    monkeypatch.setattr(engine, "generate", broken)
    service.start()
    first = Begun(service.ask(Ask(ids(40), max_tokens=LONG)))
    bad, good = service.ask(Ask(ids(9))), service.ask(Ask(ids(8), max_tokens=6))
    with pytest.raises(RuntimeError, match="the request failed: nine"):
        list(bad.events(WAIT))
    assert text_of(good)[0] == expected(ids(8), new=6)
    assert first.text() == expected(ids(40), new=LONG)


def test_short_memory_while_others_join(make, engine, ids, expected, monkeypatch):
    """They go on one after the other."""
    together, failed = engine.together, []

    def short(caches, *args):
        if len(caches) > 1 and not failed:
            failed.append(len(caches))
            raise torch.OutOfMemoryError("no room")
        return together(caches, *args)

    monkeypatch.setattr(engine, "together", short)
    service = make()
    service.start()
    first = Begun(service.ask(Ask(ids(40), max_tokens=LONG)))
    second = service.ask(Ask(ids(9), max_tokens=6))
    assert text_of(second)[0] == expected(ids(9), new=6)
    assert first.text() == expected(ids(40), new=LONG)
    assert failed == [2]


def test_memory_that_is_too_short_for_a_newcomer(make, engine, ids, monkeypatch):
    """It does not end a sampled answer, of which words were sent."""
    service, generate = make(), engine.generate

    def short(input_ids, *args, **kwargs):
        if input_ids.shape[1] == 90:
            raise torch.OutOfMemoryError("no room")
        return generate(input_ids, *args, **kwargs)

    monkeypatch.setattr(engine, "generate", short)
    service.start()
    first = Begun(service.ask(Ask(ids(40), temperature=0.8, max_tokens=LONG)))
    second = service.ask(Ask(ids(90), temperature=0.8, max_tokens=6))
    with pytest.raises(RuntimeError, match="memory is too small"):
        list(second.events(WAIT))
    first.text()
    assert first.end.usage.completion_tokens == LONG


def test_none_joins_once_memory_was_short(make, engine, ids, batches, monkeypatch):
    """Others come all the time, and what was begun is not begun again for each of them."""

    def short(caches, *args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine, "together", short)
    service = make()
    service.start()
    first = Begun(service.ask(Ask(ids(40), max_tokens=LONG)))
    later = [service.ask(Ask(ids(9, seed=n), max_tokens=9)) for n in range(6)]
    first.text()
    assert [text_of(answer)[1].usage.completion_tokens for answer in later] == [9] * 6
    assert first.end.usage.completion_tokens == LONG


def test_the_only_client_leaves_as_others_join(make, ids, expected):
    service = make()
    join = service._join

    def leaving(running):
        more = join(running)
        if more:
            first.cancel()
        return more

    service._join = leaving
    service.start()
    first = service.ask(Ask(ids(40), max_tokens=LONG))
    Begun(first)
    assert text_of(service.ask(Ask(ids(9), max_tokens=6)))[0] == expected(ids(9), new=6)
    assert service.counts.failed == 0


@pytest.mark.parametrize("after", [0, 2])
def test_a_newcomer_that_leaves_is_not_read_to_its_end(make, engine, ids, expected, after):
    service, chunks = make(), []

    def progress(done, total):
        if total > 200:
            chunks.append(done)
            if len(chunks) == after:
                second.cancel()

    join, engine.progress = service._join, progress

    def leaving(running):
        more = join(running)
        if more and not after:
            second.cancel()
        return more

    service._join = leaving
    service.start()
    first = Begun(service.ask(Ask(ids(40), max_tokens=LONG)))
    second = service.ask(Ask(ids(300), max_tokens=6))
    assert first.text() == expected(ids(40), new=LONG)
    assert len(chunks) == after and service.counts.cancelled == 1 and not service.counts.failed


def test_the_width_of_a_batch_does_not_grow(make, engine, ids, monkeypatch):
    widths, together = [], engine.together

    def seeing(caches, *args):
        cache = together(caches, *args)
        widths.append((cache.seen, max(len(ids) for ids in cache.token_ids)))
        return cache

    monkeypatch.setattr(engine, "together", seeing)
    service = make()
    service.start()
    before = Begun(service.ask(Ask(ids(20), max_tokens=30)))
    for n in range(8):  # each is there when the one before ends
        after = Begun(service.ask(Ask(ids(20, seed=n), max_tokens=30)))
        before.text()
        before = after
    before.text()
    assert max(max(widths)) <= 20 + 30


def test_only_the_batch_that_goes_on_is_held(make, engine, ids, monkeypatch):
    held, together = [], engine.together

    def counting(caches, *args):
        gc.collect()
        live = [each for each in gc.get_objects() if isinstance(each, RetainedCache)]
        held.append(len(live) - len(caches))
        return together(caches, *args)

    monkeypatch.setattr(engine, "together", counting)
    service = make()
    service.start()
    others = [Begun(service.ask(Ask(ids(n), max_tokens=LONG))) for n in (40, 9, 8)]
    for each in others:
        each.text()
    assert held == [0, 0]


def test_clients_that_leave_while_others_join(make, ids, expected):
    service = make()
    service.start()
    first = service.ask(Ask(ids(40), max_tokens=LONG))
    Begun(first)
    second = service.ask(Ask(ids(9), max_tokens=LONG))
    Begun(second)
    first.cancel()
    third = service.ask(Ask(ids(8), max_tokens=6))
    assert text_of(third)[0] == expected(ids(8), new=6)
    second.cancel()
    assert text_of(service.ask(Ask(ids(7), max_tokens=6)))[0] == expected(ids(7), new=6)
    assert service.counts.failed == 0 and service.counts.cancelled == 2


def test_contexts_of_other_settings_are_asked_apart(make, tokenizer, ids, expected, twin, batches):
    """They were stored by an engine of another budget, which its caches remember."""
    contexts = Contexts()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    other = locret.Engine(model, heads=tiny_heads(model), **SMALL | {"positions": "original"})
    read = [engine.prefill(torch.tensor([ids(50)])) for engine in (twin, other)]
    infos = [contexts.put(cache.fork()) for cache in read]
    service = make(contexts=contexts)
    service.start()
    first = Begun(service.ask(Ask(ids(4), infos[0].id, max_tokens=LONG)))
    second = service.ask(Ask(ids(5), infos[1].id, max_tokens=6))
    assert first.text() == expected(ids(4), read[0], new=LONG)
    assert text_of(second)[0] == expected(ids(5), read[1], new=6)
    assert max(batches) == 1


def test_sampled_answers_join_those_sampled_alike(make, ids, batches):
    service = make()
    service.start()
    first = Begun(service.ask(Ask(ids(40), temperature=0.7, max_tokens=LONG)))
    second = service.ask(Ask(ids(9), temperature=0.7, max_tokens=6))
    assert text_of(second)[1].usage.completion_tokens == 6
    first.text()
    assert first.end.usage.completion_tokens == LONG and max(batches) == 2


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_tokens_that_were_read_for_a_request_are_not_cached_for_it(
    make, tokenizer, ids, monkeypatch, positions
):
    """Its beginning is read when it wants to join, and again, from memory, where it cannot."""
    monkeypatch.setattr("locret.serve.contexts.SHARED_LEAST", 20)
    contexts = Contexts()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    other = locret.Engine(model, heads=tiny_heads(model), **SMALL | {"positions": positions})
    info = contexts.put(other.prefill(torch.tensor([ids(50)])))
    service = make(contexts=contexts)
    service.start()
    first = Begun(service.ask(Ask(ids(4), info.id, max_tokens=LONG)))
    second = service.ask(Ask(ids(40, seed=3), shared=30, max_tokens=6))
    assert text_of(second)[1].usage.cached_tokens == 0
    first.text()
    third = service.ask(Ask(ids(40, seed=3), shared=30, max_tokens=6))
    assert text_of(third)[1].usage.cached_tokens == 30
