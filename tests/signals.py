"""What tests of signals share: the statuses, and the handlers of a process that a user starts."""

import signal

import pytest

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(autouse=True)
def handlers():
    """Those of a process that a user starts; this one may ignore Ctrl-C, in the background."""
    ours = {number: signal.getsignal(number) for number in STATUS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in ours.items():
        signal.signal(number, handler)
