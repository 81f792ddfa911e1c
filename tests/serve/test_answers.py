"""Events reach whoever waits for them, once, and in their order."""

import asyncio
import threading
import time

import pytest

from locret.serve.requests import Answer, Cancelled, ContextInfo, End, Piece, Reading, Usage

END = End("stop", Usage(1, 0, 2, 3, 4))


def test_events_come_as_they_are_put():
    answer, got = Answer(), []
    reader = threading.Thread(target=lambda: got.extend(answer.events(10)))
    reader.start()
    for message in (Piece("a"), Piece("b"), END):
        assert answer.put(message, last=message is END)
        time.sleep(0.01)
    reader.join()
    assert got == [Piece("a"), Piece("b"), END] == list(answer.events(0))  # a second time, too


def test_nothing_comes_after_the_end():
    answer = Answer()
    ends = []
    answer.on_end = lambda: ends.append(answer.outcome)
    answer.put(END, last=True)
    answer.cancel()
    assert not answer.put(Piece("late")) and not answer.close(ValueError())
    assert list(answer.events()) == [END] and ends == [(END, None)]


def test_what_came_before_an_error_is_passed_on():
    answer = Answer()
    answer.put(Piece("a"))
    answer.cancel()
    events = answer.events()
    assert next(events) == Piece("a")
    with pytest.raises(Cancelled):
        next(events)


def test_waiting_ends_in_time():
    with pytest.raises(TimeoutError, match=r"within 0\.01 seconds"):
        next(Answer().events(0.01))
    with pytest.raises(TimeoutError):
        Reading().result(0.01)


def test_event_loops_are_woken_from_threads():
    answer, reading = Answer(), Reading()
    info = ContextInfo("ctx", 1, 2, 3)

    def work():
        for message in (Piece("a"), END):
            time.sleep(0.02)
            answer.put(message, last=message is END)
        reading.put(info, last=True)

    async def wait():
        threading.Thread(target=work).start()
        return [event async for event in answer.aevents()], await reading.aresult()

    assert asyncio.run(asyncio.wait_for(wait(), 10)) == ([Piece("a"), END], info)


def test_a_loop_that_waits_for_all_is_woken_once(monkeypatch):
    answer, woken = Answer(), []

    def work():
        for message in (Piece("a"), Piece("b"), END):
            time.sleep(0.02)
            answer.put(message, last=message is END)

    async def wait():
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: (woken.append(a), call(*a)))
        threading.Thread(target=work).start()
        return await answer.aall()

    assert asyncio.run(asyncio.wait_for(wait(), 10)) == [Piece("a"), Piece("b"), END]
    assert len(woken) <= 2  # `wait_for` may use it too
    assert asyncio.run(answer.aall()) == [Piece("a"), Piece("b"), END]  # also afterwards
    cancelled = Answer()
    cancelled.cancel()
    with pytest.raises(Cancelled):
        asyncio.run(cancelled.aall())


def test_a_loop_that_is_gone_does_no_harm():
    answer = Answer()

    async def look():
        events = answer.aevents()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 0.01)

    asyncio.run(look())
    assert answer.put(END, last=True) and list(answer.events()) == [END]
