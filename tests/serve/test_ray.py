"""Replicas behind one address. The real cluster takes a minute: set LOCRET_RAY=1 to run it."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import psutil
import pytest

pytest.importorskip("ray.serve")

from tests.serve.command import Command
from tests.serve.live import until
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

SMALL = "--device cpu --policy knorm --budget 32 --chunk-size 16 --stabilizers 4 --local-tokens 8"
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
def test_a_replica_is_killed_in_the_middle(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps a token
    folder = tmp_path / "contexts"
    served = Command(model, *SMALL.split(), "--contexts", folder, "--ray", "--replicas", 2)
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
