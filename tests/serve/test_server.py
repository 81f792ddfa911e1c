"""The port that a server takes: nobody else has it, and a restart gets it at once."""

import socket
import threading

import httpx2 as httpx
import pytest

from locret.serve.app import bound, make_app
from tests.serve.fake import FakeService
from tests.serve.live import running, until
from tests.tiny_tokenizer import tiny_tokenizer


def test_a_port_is_taken_before_anybody_listens():
    with bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1 port {port}: Address already in use"):
            bound("127.0.0.1", port)
    bound("127.0.0.1", port).close()


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_longer_than_the_drain_is_told(stream):
    service = FakeService(ends=False)
    app = make_app(service, tiny_tokenizer(), name="tiny", drain_seconds=0)
    said, body = [], {"messages": [{"role": "user", "content": "Hello"}], "stream": stream}

    def ask(url):
        found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)
        said.append((found.status_code, found.text))

    with running(app, drain_seconds=0) as url:
        asking = threading.Thread(target=ask, args=(url,))
        asking.start()
        until(lambda: service.pending)
    asking.join(20)
    [(status, text)] = said
    assert status == (200 if stream else 503) and '"stopping"' in text


def test_connections_of_a_server_that_ended_keep_no_port():
    with running(make_app(FakeService(), tiny_tokenizer(), name="tiny")) as url:
        port = httpx.URL(url).port
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while client.recv(1000):  # the server ends first, and its side waits for a while
                pass
        with pytest.raises(OSError, match="in use"):
            bound("127.0.0.1", port)
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))
    with bound("127.0.0.1", port) as again:
        again.listen()
