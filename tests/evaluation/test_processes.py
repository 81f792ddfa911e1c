"""Several processes of one run: which accelerator each takes, and that they end together."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from locret.evaluation import evaluate
from locret.evaluation.ask import Ranks

SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def children(monkeypatch):
    """Processes in place of those that would load a model; the list of them."""
    started = []

    def start(arguments, rank, count, log):
        started.append(subprocess.Popen([sys.executable, "-c", *arguments]))
        return started[-1]

    monkeypatch.setattr(evaluate, "_start", start)
    monkeypatch.setattr(evaluate, "POLL_SECONDS", 0.01)
    return started


def test_sigterm_ends_the_children_too(children, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        evaluate.run_together([SLEEP], 2, tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert left.value.code == 128 + signal.SIGTERM
    assert [child.returncode for child in children] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_that_gets_no_signals_runs_them_as_well(children, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(evaluate.run_together, ["pass"], 2, tmp_path, lambda: None).result()
    assert [child.returncode for child in children] == [0, 0]


@pytest.mark.parametrize(
    ("cards", "ranks", "wanted", "device"),
    [
        (0, Ranks(), None, None),
        (0, Ranks(), "cuda:0", None),  # the harness asks for it by default
        (0, Ranks(1, 2), "cuda", None),
        (0, Ranks(), "cpu", "cpu"),
        (2, Ranks(), None, None),
        (2, Ranks(), "cuda:1", "cuda:1"),
        (2, Ranks(3, 4), None, "cuda:1"),
        (1, Ranks(3, 4), "cuda", "cuda:0"),
        (2, Ranks(1, 4), "cpu", "cpu"),
    ],
)
def test_processes_take_accelerators_in_turn(cards, ranks, wanted, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert ranks.device(wanted) == device


def test_ranks_come_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.of_environment() == Ranks(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Ranks.of_environment() == Ranks(2, 3)
