"""Many clients at once, a fifth of which leave: all others get the answer they get alone."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.serve.live import until
from tests.serve.served import Served
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
STORY = "The quiet otter of Uppsala collects stamps. "
KINDS, CLIENTS, REQUESTS = 20, 16, 200
MOST_GROWTH = 32  # MiB


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=8192)
    model.save_pretrained(folder)
    engine = "--policy keydiff --budget 64 --chunk-size 32 --stabilizers 8 --local-tokens 8"
    command = Served(folder, *engine.split(), "--device", "cpu", "--dtype", "float32")
    yield command
    assert command.stop()[0] == 0


@pytest.fixture(scope="module")
def client(command):
    with httpx.Client(base_url=command.url, timeout=60) as client:
        yield client


def request(kind, contexts):
    """One of the different requests: short ones, long ones, and questions about contexts."""
    rng = random.Random(kind)
    text = f"Question {kind}: " + "otter " * rng.randrange(60)
    messages = [{"role": "user", "content": text}]
    given = {"messages": messages, "temperature": 0, "max_tokens": rng.randrange(5, 30)}
    if kind % 2:
        return given | {"context": rng.choice(contexts)}
    if kind % 4:
        messages.insert(0, {"role": "system", "content": STORY * 30})
    return given


def memory(command):
    """MiB of the server."""
    statm = Path(f"/proc/{command.process.pid}/statm")
    return int(statm.read_text().split()[1]) * 4 / 1024 if statm.exists() else 0


def said(client, given):
    found = client.post(CHAT, json=given)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["message"]["content"]


def leave(client, given, streams):
    """Ask, and leave in the middle of the answer or before it."""
    if streams:
        with client.stream("POST", CHAT, json=given | {"stream": True}) as found:
            next(found.iter_lines())
        return
    try:
        client.post(CHAT, json=given, timeout=0.05)
    except httpx.ReadTimeout:
        return


def test_two_hundred_requests_of_sixteen_clients(command, client):
    lengths = (10, 20, 30)
    made = [client.post("/v1/contexts", json={"text": STORY * n}).json() for n in lengths]
    requests = [request(kind, [each["id"] for each in made]) for kind in range(KINDS)]
    alone = [said(client, given) for given in requests]

    def ask(place):
        kind = place % KINDS
        if place % 5 == 0:
            leave(client, requests[kind], streams=place % 2)
            return "left"
        return "as alone" if said(client, requests[kind]) == alone[kind] else "otherwise"

    def round_of_requests():
        with ThreadPoolExecutor(CLIENTS) as pool:
            return Counter(pool.map(ask, range(REQUESTS)))

    round_of_requests()  # memory that an allocator keeps is asked for once
    before = memory(command)
    found = round_of_requests()
    assert found == {"as alone": REQUESTS * 4 // 5, "left": REQUESTS // 5}
    assert memory(command) - before < MOST_GROWTH
    idle = ("locret_queue_requests 0.0", "locret_running_requests 0.0", "locret_failed_total 0.0")
    until(lambda: all(line in client.get("/metrics").text for line in idle), 10)
