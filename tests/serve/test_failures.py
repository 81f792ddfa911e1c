"""What goes wrong with one request is told to it, and the service lives on."""

import pytest
import torch

from locret.serve.contexts import Contexts
from locret.serve.requests import Ask, RepeatsContext, Stopping, UnknownContext
from tests.serve.conftest import WAIT, text_of


def test_a_question_that_repeats_its_context_fails_alone(make, ids, expected, twin):
    service = make(contexts=Contexts())
    service.start()
    info = service.read(ids(20)).result(WAIT)
    repeating, other = service.ask(Ask(ids(20) + [9], info.id)), Ask(ids(4), info.id, max_tokens=8)
    assert text_of(service.ask(other))[0] == expected(ids(4), twin.prefill(torch.tensor([ids(20)])))
    with pytest.raises(RepeatsContext, match="begins with the whole context"):
        list(repeating.events(WAIT))


def test_a_context_deleted_while_a_question_waits_is_not_found(make, ids, twin):
    contexts = Contexts()
    service = make(contexts=contexts)
    info = contexts.put(twin.prefill(torch.tensor([ids(20)])))
    answer = service.ask(Ask(ids(4), info.id, max_tokens=8))
    contexts.delete(info.id)
    service.start()
    with pytest.raises(UnknownContext):
        list(answer.events(WAIT))


def test_short_memory_halves_the_batch(make, engine, ids, expected, monkeypatch):
    rows, generate = [], engine.generate

    def short(input_ids, *args, **kwargs):
        rows.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return generate(input_ids, *args, **kwargs)

    monkeypatch.setattr(engine, "generate", short)
    service = make()
    answers = [service.ask(Ask(ids(20, seed=n), max_tokens=6)) for n in range(5)]
    service.start()
    assert [text_of(a)[0] for a in answers] == [expected(ids(20, seed=n), new=6) for n in range(5)]
    assert rows == [5, 3, 2, 1, 2]


def test_short_memory_in_the_middle_of_answers(make, engine, ids, expected, monkeypatch):
    """What was sent is not sent twice."""
    generate = engine.generate

    def short(input_ids, *args, stopping_criteria, **kwargs):
        def after_four(seen, scores, **more):
            if len(seen) > 1 and seen.shape[1] == 24:
                raise torch.OutOfMemoryError("no room")
            return torch.zeros(len(seen), dtype=torch.bool)

        criteria = [*stopping_criteria, after_four]
        return generate(input_ids, *args, stopping_criteria=criteria, **kwargs)

    monkeypatch.setattr(engine, "generate", short)
    service = make()
    answers = [service.ask(Ask(ids(20, seed=n), max_tokens=9)) for n in range(2)]
    service.start()
    assert [text_of(a)[0] for a in answers] == [expected(ids(20, seed=n), new=9) for n in range(2)]


def test_a_failure_ends_its_answers_alone(make, engine, ids, expected, monkeypatch):
    service = make()
    with monkeypatch.context() as broken:
        broken.setattr(engine, "generate", lambda *a, **k: 1 // 0)
        answer = service.ask(Ask(ids(9)))
        service.start()
        with pytest.raises(RuntimeError, match="the request failed: integer division"):
            next(answer.events(WAIT))
    assert text_of(service.ask(Ask(ids(9), max_tokens=8)))[0] == expected(ids(9))
    assert service.counts.failed == service.counts.answered == 1


def test_short_memory_lets_shared_beginnings_go(make, engine, ids, monkeypatch):
    service = make(contexts=Contexts())
    service.start()
    shared = Ask(ids(300) + ids(5, seed=1), shared=300, max_tokens=4)
    text = text_of(service.ask(shared))[0]
    assert service.counts.bytes > 0
    for name in ("prefill", "generate"):
        calls, whole = [], getattr(engine, name)

        def short(*args, calls=calls, whole=whole, **kwargs):
            calls.append(0)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("no room")
            return whole(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(engine, name, short)
            if name == "prefill":
                service.contexts.delete(service.read(ids(30)).result(WAIT).id)
                assert service.counts.bytes == 0
            else:
                assert text_of(service.ask(shared))[0] == text
        assert len(calls) == 2


def test_memory_that_is_too_short(make, engine, ids, monkeypatch):
    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine, "prefill", short)
    monkeypatch.setattr(engine, "generate", short)
    service = make(contexts=Contexts())
    service.start()
    answers = [service.ask(Ask(ids(9))) for _ in range(3)]
    for wait in (*(lambda a=a: list(a.events(WAIT)) for a in answers), service.read(ids(9)).result):
        with pytest.raises(RuntimeError, match="the device's memory is too small"):
            wait()
    assert service.counts.failed == 4 and service.ready


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended(make, engine, ids, monkeypatch):
    def end(*args, **kwargs):
        raise SystemExit

    monkeypatch.setattr(engine, "generate", end)
    service = make(batch=1)
    answers = [service.ask(Ask(ids(9))) for _ in range(2)]
    service.start()
    for answer in answers:
        with pytest.raises(RuntimeError, match="the service has ended"):
            list(answer.events(WAIT))
    assert not service.ready
    with pytest.raises(Stopping):
        service.ask(Ask(ids(9)))
