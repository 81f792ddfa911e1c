"""Clients refused for now are told when to come again, in whole seconds; others are not."""

import contextlib
import math
import threading
from types import SimpleNamespace

import httpx2 as httpx
import pytest

from locret.serve.app import make_app
from locret.serve.replies import refusal_of
from locret.serve.requests import QueueFull
from locret.serve.service import SMOOTHING
from tests.serve.conftest import WAIT
from tests.serve.live import running, until

CHAT, TEXT, CONTEXTS = "/v1/chat/completions", "/v1/completions", "/v1/contexts"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
ASKED = [(CHAT, HELLO), (CHAT, HELLO | {"stream": True}), (TEXT, {"prompt": "Hello"})]
ASKED.append((CONTEXTS, {"text": "Hello"}))


@pytest.fixture
def served(make, tokenizer):
    """A service with these settings, and a client of its server."""
    stack = []

    def of(**settings):
        service = make(**settings)
        serving = running(make_app(service, tokenizer, name="tiny"))
        client = httpx.Client(base_url=serving.__enter__(), timeout=WAIT)
        stack.extend([lambda: serving.__exit__(None, None, None), client.close])
        return service, client

    yield of
    while stack:
        stack.pop()()


@pytest.fixture
def busy(engine, monkeypatch):
    """Lets the engine wait within an answer until it is set."""
    go_on, generate = threading.Event(), engine.generate

    def waiting(*args, **kwargs):
        assert go_on.wait(WAIT)
        return generate(*args, **kwargs)

    monkeypatch.setattr(engine, "generate", waiting)
    yield go_on
    go_on.set()


def refused(response, status, code):
    """The seconds after which the client is told to come again."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == code
    assert response.headers["retry-after"].isdecimal()
    return int(response.headers["retry-after"])


@contextlib.contextmanager
def asking(service, client):
    """While it is entered, one request is answered and two wait; what they are told."""
    told = []
    threads = [
        threading.Thread(target=lambda: told.append(client.post(CHAT, json=HELLO)))
        for _ in range(3)
    ]
    threads[0].start()
    until(lambda: service.counts.running == 1)
    for thread in threads[1:]:
        thread.start()
    until(lambda: service.counts.queued == 2)
    yield told
    for thread in threads:
        thread.join(WAIT)


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_a_full_queue_says_when_there_is_room(path, body, served, busy):
    service, client = served(queue=2, batch=1)
    with asking(service, client) as told:
        # Each of the three takes a second, as far as is known.
        assert refused(client.post(path, json=body), 429, "queue_full") == 3
        assert service.counts.refused == 1
        busy.set()
    assert [answer.status_code for answer in told] == [200] * 3
    again = client.post(path, json=body)
    assert again.status_code == 200 and "retry-after" not in again.headers


def test_the_longer_answers_take_the_later_clients_come_again(served, busy, monkeypatch):
    service, client = served(queue=2, batch=1)
    now = [0.0]
    monkeypatch.setattr("locret.serve.service.time", SimpleNamespace(monotonic=lambda: now[0]))
    with asking(service, client):
        now[0] = 100.0
        busy.set()
    until(lambda: not service.counts.running)
    busy.clear()
    with asking(service, client):
        # The first answer took a hundred seconds, two others none; see SMOOTHING.
        told = refused(client.post(CHAT, json=HELLO), 429, "queue_full")
        busy.set()
    expected = (1 + SMOOTHING * 99) * (1 - SMOOTHING) ** 2
    assert told == math.ceil(round(3 * expected, 1))


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.1, "2"), (299.5, "300")]
)
def test_seconds_are_whole_and_not_too_few(seconds, told):
    assert refusal_of(QueueFull("full", seconds)).headers == {"Retry-After": told}


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_a_server_that_stops_takes_nothing_more(path, body, served):
    service, client = served()
    service.close(seconds=WAIT)
    assert refused(client.post(path, json=body), 503, "stopping") == 1
    assert service.counts.refused == 0


def test_what_waits_for_too_long_while_a_server_stops(served, busy):
    service, client = served(batch=1)
    closing = threading.Thread(target=service.close, kwargs={"drain": False, "seconds": WAIT})
    with asking(service, client) as told:
        closing.start()
    assert [refused(answer, 503, "stopping") for answer in told] == [1] * 3
    busy.set()
    closing.join(WAIT)


def test_a_server_that_is_not_ready(served):
    service, client = served()
    assert client.get("/ready").status_code == 200
    service.close(seconds=WAIT)
    assert refused(client.get("/ready"), 503, "not_ready") == 1


def test_what_will_not_be_better_later_is_not_asked_for_again(served, engine, monkeypatch):
    _, client = served()
    monkeypatch.setattr(engine, "generate", lambda *args, **kwargs: 1 // 0)
    given = {
        200: client.get("/health"),
        400: client.post(CHAT, json={"messages": []}),
        404: client.get(f"{CONTEXTS}/none"),
        405: client.put(CHAT, json={}),
        500: client.post(CHAT, json=HELLO),
    }
    for status, response in given.items():
        assert response.status_code == status, response.text
        assert "retry-after" not in response.headers
