"""Replicas behind one address. The real cluster takes a minute: set LOCRET_RAY=1 to run it."""

import asyncio
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import psutil
import pytest

pytest.importorskip("ray.serve")

from types import SimpleNamespace

from fastapi import Request
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from locret.cli import main
from locret.commands import serve as serve_command
from locret.serve.app import make_app
from locret.serve.ray_app import Ingress, app, context_of, messages_of
from tests.serve.command import Command
from tests.serve.fake import FakeService
from tests.serve.live import running, until
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

SETTINGS = ["--device", "cpu", "--policy", "knorm", "--budget", "32", "--chunk-size", "16"]
REQUESTS, CONTEXTS, CLIENTS = 100, 10, 8
KILLED_AFTER = 30  # answers
real = pytest.mark.skipif(not os.environ.get("LOCRET_RAY"), reason="LOCRET_RAY is not set")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray") / "model"
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- without a cluster ---------------------------------------------------------------------------


def test_a_recorded_cluster_that_does_not_answer_is_told(monkeypatch):
    """Ray itself tries for ever."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(serve_command, "RAY_ANSWERS", 0.1)
    with pytest.raises(ValueError, match=":1 does not answer; start it, or unset RAY_ADDRESS"):
        serve_command.connect_to_ray()


CHAT, ID = "/v1/chat/completions", "ctx_" + "0" * 22
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "context": ID}


class Replicas:
    """Stands for Ray's handle.

    Args:
        dies: for each request in turn, after how many messages its replica is lost; None = never.
    """

    def __init__(self, dies=()):
        self.service = FakeService()
        self.app = make_app(self.service, tiny_tokenizer(), name="tiny", api_key="secret")
        self.dies, self.contexts, self.answer = list(dies), [], self

    def options(self, *, stream, multiplexed_model_id):
        assert stream
        self.contexts.append(multiplexed_model_id)
        return self

    def remote(self, scope, body):
        return Messages(messages_of(self.app, scope, body), self.dies.pop(0) if self.dies else None)


class Messages:
    def __init__(self, messages, left):
        self.messages, self.left = messages, left

    def __aiter__(self):
        return self

    async def __anext__(self):
        if isinstance(self.left, Exception):
            raise self.left
        if self.left == 0:
            raise ActorDiedError
        self.left = None if self.left is None else self.left - 1
        return await anext(self.messages)

    def cancel(self):
        self.cancelled = True


@pytest.fixture
def ask():
    """Asks an ingress over replicas, with the key."""

    def of(replicas, fields=HELLO, key="secret"):
        ingress = Ingress(replicas, "secret", 2**20)

        async def app(scope, receive, send):
            if scope["type"] == "http":
                await (await ingress(Request(scope, receive)))(scope, receive, send)

        app.state = SimpleNamespace(server=SimpleNamespace(page=None))
        headers = {"Authorization": f"Bearer {key}"}
        with running(app) as url:
            return httpx.post(url + CHAT, json=fields, headers=headers)

    return of


def test_an_answer_is_passed_on(ask):
    replicas = Replicas()
    answer = ask(replicas)
    assert answer.json()["choices"][0]["message"]["content"] == "It is."
    assert replicas.contexts == [ID]
    assert [ask.context for ask in replicas.service.asked] == [ID]


def test_a_replica_lost_before_it_said_anything_is_replaced_by_another(ask):
    assert ask(Replicas(dies=[0, None])).json()["choices"]
    assert ask(Replicas(dies=[1, None])).json()["choices"]
    answer = ask(Replicas(dies=[0, 1, None]))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "replica_lost"


def test_a_replica_lost_after_its_answer_does_not_matter(ask):
    assert ask(Replicas(dies=[2])).json()["choices"]


def test_a_stream_whose_replica_is_lost_says_so(ask):
    answer = ask(Replicas(dies=[3]), HELLO | {"stream": True})
    *events, error, done = [line[6:] for line in answer.text.split("\n\n") if line]
    assert json.loads(error)["error"]["code"] == "replica_lost"
    assert done == "[DONE]" and len(events) == 2


def test_too_many_requests_are_told_to_come_again(ask):
    answer = ask(Replicas(dies=[BackPressureError(9, 9)]))
    assert answer.status_code == 503 and answer.headers["retry-after"]


def test_no_replica_sees_a_request_without_the_key(ask):
    replicas = Replicas()
    assert ask(replicas, key="other").status_code == 401
    assert replicas.contexts == []


def test_an_answer_that_nobody_waits_for_is_cancelled():
    replicas = Replicas()
    replicas.service.ends = False
    headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer secret")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "headers": headers,
        "query_string": b"",
    }

    async def leave_early():
        messages = messages_of(replicas.app, scope, json.dumps(HELLO | {"stream": True}).encode())
        await anext(messages)
        await messages.aclose()

    asyncio.run(leave_early())
    assert replicas.service.cancelled


@pytest.mark.parametrize(
    ("path", "body", "context"),
    [
        (CHAT, {"context": ID}, ID),
        (CHAT, {"context": ID + "0"}, ""),
        (CHAT, {"context": [ID]}, ""),
        (CHAT, {"messages": '"context"'}, ""),
        (CHAT, ["context"], ""),
        (f"/v1/contexts/{ID}", None, ID),
    ],
)
def test_the_context_that_a_request_is_about(path, body, context):
    assert context_of(path, b"" if body is None else json.dumps(body).encode()) == context


def test_bodies_that_are_no_json_are_about_no_context():
    assert context_of(CHAT, b'{"context"') == context_of(CHAT, b"[" * 10**5 + b'"context"') == ""


def test_settings_of_serve_run(model, tmp_path):
    from ray import serve

    settings = {"model": model, "policy": "knorm", "budget": 32, "contexts": tmp_path, "gpus": 0}
    made = app(settings | {"max_tokens": 4, "replicas": 2})
    assert isinstance(made, serve.Application)
    with pytest.raises(ValueError, match="model=MODEL"):
        app({"budget": 32})
    with pytest.raises(ValueError, match="give --contexts"):
        app({"model": model})


# ---- a cluster -----------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster of the test's own is started, whatever runs on this machine."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps a token


class Clients:
    """Ask one server, and come again where it says so."""

    def __init__(self, url):
        self.http = httpx.Client(base_url=url, timeout=120)
        self.told_to_retry = 0
        self.answered = threading.Semaphore(0)

    def read(self, text):
        answer = self.http.post("/v1/contexts", json={"text": text})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def ask(self, context, stream=False):
        while (text := self.try_once(context, stream)) is None:
            self.told_to_retry += 1
        self.answered.release()
        return text

    def try_once(self, context, stream):
        """The answer; None for a clean error that says to ask again."""
        messages = [{"role": "user", "content": "Who?"}]
        fields = {"context": context, "messages": messages, "temperature": 0, "max_tokens": 48}
        answer = self.http.post("/v1/chat/completions", json=fields | {"stream": stream})
        if answer.status_code == 503:
            assert answer.headers["retry-after"] and answer.json()["error"]["message"]
            return None
        assert answer.status_code == 200, answer.text
        if not stream:
            return answer.json()["choices"][0]["message"]["content"]
        *events, done = [line[6:] for line in answer.text.split("\n\n") if line]
        assert done == "[DONE]"
        events = [json.loads(event) for event in events]
        if "error" in events[-1]:
            assert events[-1]["error"]["code"] == "replica_lost"
            return None
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def replicas_of(process):
    """The processes that answer."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [one for one in found if one.name().startswith("ray::") and is_replica(one)]


def is_replica(process):
    return "ServeReplica:locret:Replica" in " ".join(process.cmdline())


@real
def test_a_replica_is_killed_in_the_middle(model, tmp_path, cluster):
    folder = tmp_path / "contexts"
    served = Command(model, *SETTINGS, "--contexts", folder, "--ray", "--replicas", 2)
    logged = threading.Thread(target=served.process.stderr.read)  # a full pipe would stop it
    logged.start()
    try:
        clients = Clients(served.url)
        ids = [clients.read(f"Otter number {n} collects stamps. " * 20) for n in range(CONTEXTS)]
        alone = [clients.ask(id) for id in ids]
        before = replicas_of(served.process)
        assert len(before) == 2
        with ThreadPoolExecutor(CLIENTS) as pool:
            asked = [
                pool.submit(clients.ask, ids[n % CONTEXTS], n % 5 == 0) for n in range(REQUESTS)
            ]
            for _ in range(CONTEXTS + KILLED_AFTER):
                assert clients.answered.acquire(timeout=60)
            before[0].kill()
            answers = [one.result() for one in asked]
        print(f"{len(answers)} answered, {clients.told_to_retry} told to come again")
        assert answers == [alone[n % CONTEXTS] for n in range(REQUESTS)]
        until(lambda: len(replicas_of(served.process)) == 2, seconds=60)
        listed = clients.http.get("/v1/contexts").json()["data"]
        assert {each["id"] for each in listed} == set(ids)
        assert [clients.ask(id) for id in ids] == alone
    finally:
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
        logged.join(10)


@real
def test_prompts_of_a_file_are_answered_by_replicas(model, tmp_path, cluster):
    prompts, answers = tmp_path / "prompts.jsonl", {}
    lines = [{"prompt": f"Otter {n}?", "context": f"It was {n % 3}. " * 20} for n in range(20)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    for name, more in (("ray", ["--ray", "--replicas", "2", "--batch", "3"]), ("alone", [])):
        file = tmp_path / name
        args = ["answer", prompts, "--model", model, *SETTINGS, "--output", file, *more]
        assert main([*map(str, args), "--max-tokens", "6"]) == 0
        found = map(json.loads, file.read_text().splitlines())
        answers[name] = {each["line"]: each["answer"] for each in found}
    assert answers["ray"] == answers["alone"] and len(answers["ray"]) == 20
