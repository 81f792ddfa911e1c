"""A server that answers on a free port, in a thread of the test."""

import contextlib
import threading
import time

from locret.serve.app import address_of, bound, make_server


@contextlib.contextmanager
def running(app, drain_seconds=5):
    """The URL of an application that is being served."""
    server = make_server(app, drain_seconds)
    with bound("127.0.0.1", 0) as taken:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield address_of(taken)
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(true, seconds=20):
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)
