"""Requests of many threads give what the engine alone gives, and nothing stays behind."""

import asyncio
import copy
import gc
import logging
import random
import threading
import time
from contextlib import closing

import pytest
import torch

import locret
from locret.cache.cache import RetainedCache
from locret.model.hooks import cache_of
from locret.serve.contexts import Contexts
from locret.serve.requests import (
    Ask,
    Cancelled,
    End,
    Piece,
    QueueFull,
    Stopping,
    TooLong,
    UnknownContext,
)
from locret.serve.service import Service
from tests.serve.conftest import SMALL, WAIT, text_of
from tests.tiny_models import tiny_heads, tiny_model


def test_units_foreseen_are_those_held(make, ids, twin):
    service = make()
    service.start()
    for length in (3, 60):
        usage = text_of(service.ask(Ask(ids(length), max_tokens=4)))[1].usage
        output = twin.generate(
            torch.tensor([ids(length)]), max_new_tokens=4, return_dict_in_generate=True
        )
        report = cache_of(output).report()
        assert usage.units == report["units"][0]
        assert usage.bytes <= report["total_bytes"]  # which has room for more


def test_prompts_of_different_lengths_are_answered_together(make, ids, expected, batches):
    service = make()
    prompts = [ids(length, seed=length) for length in (3, 60, 31, 5, 60)]
    lengths = [8, 3, 12, 1, 8]
    answers = [service.ask(Ask(p, max_tokens=n)) for p, n in zip(prompts, lengths, strict=True)]
    service.start()
    for prompt, new, answer in zip(prompts, lengths, answers, strict=True):
        text, end = text_of(answer)
        assert text == expected(prompt, new=new)
        assert end.reason == "length"
        assert end.usage.prompt_tokens == len(prompt)
        assert end.usage.completion_tokens == new
    assert batches == [5]
    assert service.counts.answered == 5 and service.counts.completion_tokens == sum(lengths)


def test_contexts_of_different_lengths_are_asked_together(make, ids, expected, twin, batches):
    service = make(contexts=Contexts())
    service.start()
    texts = [ids(length, seed=length) for length in (60, 33, 9)]
    infos = [service.read(text).result(WAIT) for text in texts]
    assert [info.tokens for info in infos] == [60, 33, 9]
    assert [info.units for info in infos] == [20, 20, 9]
    asks = [Ask(ids(1 + n, seed=n), infos[n % 3].id, max_tokens=6) for n in range(7)]
    answers = list(map(service.ask, asks))
    for n, answer in enumerate(answers):
        text, end = text_of(answer)
        cache = twin.prefill(torch.tensor([texts[n % 3]]))
        assert text == expected(asks[n].prompt, cache, new=6)
        assert end.usage.cached_tokens == len(texts[n % 3])
        assert end.usage.prompt_tokens == len(texts[n % 3]) + 1 + n
        assert end.usage.units == round(sum(cache.report()["units"]) / 2)
    assert max(batches) > 1
    alike = [service.ask(Ask(ids(4, seed=n), infos[n].id, max_tokens=6)) for n in range(3)]
    right = [expected(ids(4, n), twin.prefill(torch.tensor([texts[n]])), new=6) for n in range(3)]
    assert [text_of(answer)[0] for answer in alike] == right
    stored = service.contexts
    assert stored.bytes_in_memory == sum(info.bytes for info in infos)
    assert stored.get(infos[0].id).seen == 60


@pytest.mark.parametrize(
    "settings",
    [
        {"positions": "original"},
        {"decode_interval": 4},
        {"quantization": {"name": "kivi", "bits": 4}},
        {"recall": {"block_size": 2, "blocks": 2, "representatives": 1}},
        {"merging": "similar"},
        {"budget": "4x"},
        {"query_aware": True},
    ],
    ids=str,
)
def test_engines_of_other_settings(tokenizer, ids, settings):
    def engine():
        model = tiny_model("llama", vocab_size=len(tokenizer))
        return locret.Engine(model, heads=tiny_heads(model), **SMALL | settings)

    def alone(tokens, cache=None):
        one = torch.tensor([tokens])
        output = by.generate(one, cache=cache, max_new_tokens=6, do_sample=False)
        return tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)

    by, service = engine(), Service(engine(), tokenizer, contexts=Contexts())
    plain = [service.ask(Ask(ids(n), max_tokens=6)) for n in (50, 9)]
    service.start()
    assert [text_of(answer)[0] for answer in plain] == [alone(ids(n)) for n in (50, 9)]
    if "query_aware" in settings:
        with pytest.raises(ValueError, match="one question only"):
            service.read(ids(50))
    else:
        infos = [service.read(ids(n)).result(WAIT) for n in (50, 31)]
        for _ in range(2):  # questions leave no trace
            asked = [service.ask(Ask(ids(4 + n), infos[n].id, max_tokens=6)) for n in (0, 1, 0)]
            caches = [by.prefill(torch.tensor([ids(n)])) for n in (50, 31, 50)]
            right = [alone(ids(4 + n), c) for n, c in zip((0, 1, 0), caches, strict=True)]
            assert [text_of(answer)[0] for answer in asked] == right
    service.close(seconds=WAIT)
    assert service.counts.failed == 0


def test_a_shared_beginning_is_read_once(make, ids, expected, twin):
    service = make()
    service.start()
    shared = ids(300)
    for seed, cached in ((1, 0), (2, 300), (3, 300)):
        rest = ids(6, seed=seed)
        text, end = text_of(service.ask(Ask(shared + rest, shared=300, max_tokens=8)))
        assert text == expected(rest, twin.prefill(torch.tensor([shared])))
        assert end.usage.prompt_tokens == 306 and end.usage.cached_tokens == cached
    text, end = text_of(service.ask(Ask(shared, shared=100, max_tokens=8)))
    assert text == expected(shared) and end.usage.cached_tokens == 0
    text, _ = text_of(service.ask(Ask(shared + shared, shared=300, max_tokens=8)))
    assert text == expected(shared + shared)


def test_a_shared_beginning_must_be_readable(tokenizer, ids):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    service = Service(locret.Engine(model, "keydiff", budget=20, chunk_size=None), tokenizer)
    for shared in (0, 1200):
        with pytest.raises(TooLong, match="1,024 positions"):
            service.ask(Ask(ids(1300), shared=shared, max_tokens=3))


def test_no_room_for_shared_beginnings(make, ids):
    service = make(prefix_bytes=1)
    service.start()
    asks = [Ask(ids(300) + ids(6, seed=n), shared=300, max_tokens=2) for n in (1, 2)]
    assert [text_of(service.ask(ask))[1].usage.cached_tokens for ask in asks] == [0, 0]
    assert service.counts.bytes == 0


def test_cancelled_while_reading(make, engine, ids, expected):
    """One chunk more at most is read, and the next request is answered."""
    chunks, first, go_on = [], threading.Event(), threading.Event()

    def progress(done, total):
        chunks.append(done)
        first.set()
        assert go_on.wait(WAIT)

    engine.progress = progress
    service = make()
    answer = service.ask(Ask(ids(300), max_tokens=8))
    service.start()
    assert first.wait(WAIT)
    answer.cancel()
    with pytest.raises(Cancelled):
        next(answer.events(WAIT))
    go_on.set()
    assert text_of(service.ask(Ask(ids(5), max_tokens=8)))[0] == expected(ids(5))
    assert chunks == [7]
    assert service.counts.cancelled == 1
    service.close(seconds=WAIT)
    assert engine.progress is progress


def test_cancelled_while_a_context_is_read(make, engine, ids):
    contexts, first, go_on = Contexts(), threading.Event(), threading.Event()
    engine.progress = lambda done, total: first.set() or go_on.wait(WAIT)
    service = make(contexts=contexts)
    service.start()
    reading = service.read(ids(70))
    assert first.wait(WAIT)
    reading.cancel()
    go_on.set()
    with pytest.raises(Cancelled):
        reading.result(WAIT)
    assert service.read(ids(9)).result(WAIT).tokens == 9
    assert contexts.count == 1


def test_cancelled_while_answering(make, ids, expected):
    """It ends within a step; the other row of the batch goes on."""
    service = make()
    given_up, other = (service.ask(Ask(ids(n), max_tokens=n)) for n in (700, 40))
    service.on_first_token = lambda seconds: given_up.cancel()
    service.start()
    assert text_of(other)[0] == expected(ids(40), new=40)
    with pytest.raises(Cancelled):
        list(given_up.events(WAIT))
    service.close(seconds=WAIT)
    assert service.counts.answered == service.counts.cancelled == 1


def test_the_queue_is_bounded(make, ids):
    service = make(queue=2)
    answers = [service.ask(Ask(ids(9), max_tokens=2)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait") as full:
        service.ask(Ask(ids(9)))
    assert full.value.retry_after >= 1
    answers[0].cancel()  # makes room at once
    service.ask(Ask(ids(9), max_tokens=2))
    assert service.counts.queued == 2 and service.counts.refused == 1


def test_an_answer_is_logged_without_a_warning(make, ids, caplog):
    logging.Logger.warning_once.cache_clear()  # another test may have been warned
    service = make()
    service.start()
    text_of(service.ask(Ask(ids(9), max_tokens=4)))
    service.close(seconds=WAIT)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_closing_finishes_what_was_asked(make, ids, expected):
    service = make(batch=2)
    answers = [service.ask(Ask(ids(30, seed=n), max_tokens=20)) for n in range(5)]
    service.start()
    assert service.ready
    service.close(seconds=WAIT)
    assert [text_of(a)[0] for a in answers] == [expected(ids(30, seed=n), new=20) for n in range(5)]
    assert not service.ready
    with pytest.raises(Stopping, match="closing"):
        service.ask(Ask(ids(9)))


def test_closing_without_finishing(make, ids):
    service = make(batch=1)
    answers = [service.ask(Ask(ids(30), max_tokens=900)) for _ in range(3)]
    service.start()
    next(answers[0].events(WAIT))
    service.close(drain=False, seconds=WAIT)
    for answer in answers:
        with pytest.raises(Cancelled):
            list(answer.events(WAIT))
    assert not [t for t in threading.enumerate() if t.name == "locret-generation"]


def test_the_same_seed_gives_the_same_answer(make, ids):
    service = make()
    asks = [Ask(ids(9), max_tokens=12, temperature=1.0, seed=seed) for seed in (1, 2, 1, 1)]
    asks.insert(3, Ask(ids(9), max_tokens=12, temperature=1.0))
    answers = list(map(service.ask, asks))
    state = torch.get_rng_state()
    service.start()
    one, two, again, _, third = (text_of(answer)[0] for answer in answers)
    assert one == again == third != two
    seeded = text_of(service.ask(asks[1]))[0]
    assert seeded == two and not torch.equal(state, torch.get_rng_state())  # the one without a seed


def test_sampling_settings_count(make, ids, expected):
    service = make()
    service.start()
    narrow = Ask(ids(9), max_tokens=8, temperature=1.0, top_p=1e-6)
    cold = [Ask(ids(9), max_tokens=8, temperature=t) for t in (1e-4, 1e-6, 1e-40, 5e-324)]
    for ask in (narrow, *cold):
        assert text_of(service.ask(ask))[0] == expected(ids(9))


def test_an_end_token_ends(make, engine, tokenizer, ids, twin):
    answer = twin.generate(torch.tensor([ids(9)]), max_new_tokens=8, do_sample=False)[
        0, 9:
    ].tolist()
    engine.model.generation_config.eos_token_id = answer[3]
    service = make()
    service.start()
    text, end = text_of(service.ask(Ask(ids(9), max_tokens=8)))
    at = answer.index(answer[3])
    assert text == tokenizer.decode(answer[:at]) and end.reason == "stop"
    assert end.usage.completion_tokens == at + 1


def test_end_tokens_may_be_ignored(make, engine, tokenizer, ids, twin, batches):
    whole = twin.generate(torch.tensor([ids(9)]), max_new_tokens=8, do_sample=False)[0, 9:].tolist()
    engine.model.generation_config.eos_token_id = whole[3]
    service = make()
    asked = [service.ask(Ask(ids(9), max_tokens=8, ignore_eos=more)) for more in (True, False)]
    service.start()
    (text, end), (shorter, stopped) = map(text_of, asked)
    assert text == tokenizer.decode(whole) and end.reason == "length"
    assert shorter == tokenizer.decode(whole[: whole.index(whole[3])]) and stopped.reason == "stop"
    assert batches == [2]


def test_a_stop_string_ends(make, ids, expected):
    whole = expected(ids(9), new=30)
    stop = whole[10:14]
    service = make()
    service.start()
    text, end = text_of(service.ask(Ask(ids(9), max_tokens=30, stop=("none of it", stop))))
    assert text == whole[: whole.index(stop)] and end.reason == "stop"


def test_too_long(make, ids):
    service = make(contexts=Contexts())
    context = Ask(ids(1100), "ctx_" + "A" * 22)
    with pytest.raises(UnknownContext):
        service.ask(context)
    service.start()
    info = service.read(ids(40)).result(WAIT)
    with pytest.raises(TooLong, match="1,024 positions.*a prompt of 1,003 tokens would fit"):
        service.ask(Ask(ids(1010), info.id))
    with pytest.raises(TooLong, match="an answer of 994 tokens would fit"):
        service.ask(Ask(ids(10), info.id, max_tokens=2000))
    text_of(service.ask(Ask(ids(2000), max_tokens=1)))  # of any length, within the budget
    assert text_of(service.ask(Ask(ids(9), info.id)))[1].usage.completion_tokens == 995


def test_memory_bounds_too(make, ids, batches):
    service = make(memory=2**20, prefix_bytes=0, contexts=Contexts())
    units = service.limits.most_units
    assert 0 < units < 1024
    with pytest.raises(TooLong, match=f"the memory for {units:,} units"):
        service.ask(Ask(ids(9), max_tokens=units))
    asks = [Ask(ids(9), max_tokens=most) for most in (units - 9, 9, 9)]
    for ask in asks:
        service.ask(ask)
    service.start()
    service.close(seconds=WAIT)
    assert batches == [1, 2]  # the first leaves no room for others


def test_requests_that_come_right_behind_each_other_are_answered_together(make, ids, batches):
    service = make(batch=3, linger=0.5)
    service.start()
    for _ in range(3):
        answer = service.ask(Ask(ids(9), max_tokens=1))
        time.sleep(0.3)
    text_of(answer)
    assert batches == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [10**6]}, "token ids are"),
        ({"prompt": [-1]}, "token ids are"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"context": "../../etc"}, "there is no context of this id"),
    ],
)
def test_what_cannot_be_asked(make, change, message):
    with pytest.raises(ValueError, match=message):
        make().ask(Ask(**{"prompt": [7, 8]} | change))


def test_in_an_event_loop(make, ids, expected):
    service = make(contexts=Contexts())
    service.start()

    async def one(prompt, **given):
        events = [event async for event in service.ask(Ask(prompt, **given)).aevents()]
        assert isinstance(events[-1], End) and all(isinstance(e, Piece) for e in events[:-1])
        return "".join(event.text for event in events[:-1])

    async def several():
        info = await service.read(ids(40)).aresult()
        given_up = service.ask(Ask(ids(9), max_tokens=900))
        asked = asyncio.gather(
            one(ids(9), max_tokens=8), one(ids(4), max_tokens=8, context=info.id)
        )
        given_up.cancel()
        with pytest.raises(Cancelled):
            async for _ in given_up.aevents():
                pass
        return (await asked)[0]

    assert asyncio.run(several()) == expected(ids(9))


def live_caches():
    gc.collect()
    return sum(isinstance(thing, RetainedCache) for thing in gc.get_objects())


def test_clients_that_leave_a_batch_leave_nothing_in_it(make, ids, expected, twin, batches):
    """One while it waits, one when the batch has begun; the third gets its answer."""
    contexts = Contexts()
    service = make(contexts=contexts)
    infos = [contexts.put(twin.prefill(torch.tensor([ids(n)]))) for n in (60, 31, 50, 40)]
    caches = live_caches()
    waits, begun, stays, last = (
        service.ask(Ask(ids(5 + n, n), info.id, max_tokens=40)) for n, info in enumerate(infos)
    )
    service.on_first_token = lambda seconds: begun.cancel()
    waits.cancel()
    service.start()
    for n, answer in ((2, stays), (3, last)):
        right = expected(ids(5 + n, n), contexts.get(infos[n].id).fork(), new=40)
        assert text_of(answer)[0] == right
    assert batches == [1, 1, 1, 2]  # begun each, and those that stayed
    service.close(seconds=WAIT)
    assert service.counts.cancelled == 2 and service.counts.answered == 2
    assert live_caches() == caches


def test_padding_is_in_the_embedding(engine, tokenizer, ids, expected):
    """Some tokenizers have a token for it that their model has not."""
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": "<|beyond|>"})
    with closing(Service(engine, larger)) as service:
        asked = [service.ask(Ask(ids(9), max_tokens=n)) for n in (1, 8)]
        service.start()
        assert [text_of(one)[0] for one in asked] == [expected(ids(9), new=n) for n in (1, 8)]


def test_many_threads_leave_nothing_behind(make, ids, expected):
    contexts = Contexts()
    service = make(contexts=contexts, queue=100)
    service.start()
    info = service.read(ids(50)).result(WAIT)
    prompts = {n: ids(5 + 9 * n, seed=n) for n in range(4)}
    right = {n: expected(prompts[n]) for n in prompts}
    threads, caches, wrong = threading.active_count(), live_caches(), []

    def client(seed):
        choose = random.Random(seed)
        for _ in range(8):
            n, drop = choose.randrange(4), choose.random() < 0.25
            on = info.id if choose.random() < 0.4 else None
            answer = service.ask(Ask(prompts[n], on, max_tokens=8))
            try:
                if drop:
                    next(answer.events(WAIT))
                    answer.cancel()
                text, _ = text_of(answer)
                if on is None and text != right[n]:
                    wrong.append(n)
            except Cancelled:
                assert drop

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    service.close(seconds=WAIT)
    assert not wrong
    counts = service.counts
    assert counts.answered + counts.cancelled == 32 and counts.queued == counts.running == 0
    assert counts.failed == 0
    assert threading.active_count() == threads - 1  # the service's own has ended, too
    assert live_caches() == caches
