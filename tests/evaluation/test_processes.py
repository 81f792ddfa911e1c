"""Several processes of one run end together."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from locret.evaluation import processes

SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def children(monkeypatch):
    """Processes in place of those that would load a model; the list of them."""
    started = []

    def start(arguments, rank, count, log):
        started.append(subprocess.Popen([sys.executable, "-c", *arguments]))
        return started[-1]

    monkeypatch.setattr(processes, "_start", start)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    return started


def test_sigterm_ends_the_children_too(children, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        processes.run_together([SLEEP], 2, tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert left.value.code == 128 + signal.SIGTERM
    assert [child.returncode for child in children] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_that_gets_no_signals_runs_them_as_well(children, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(processes.run_together, ["pass"], 2, tmp_path, lambda: None).result()
    assert [child.returncode for child in children] == [0, 0]
