"""Evaluations and grids that a signal stops: the status, what they say, and that they go on."""

import os
import signal
import time

import pytest
import yaml

from locret.evaluation import evaluate
from tests.evaluation.eval_data import DATA, write_artifacts, write_data
from tests.forked import Forked, fork_ranks

SAYS = "stopped; the same command goes on where it stopped"
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    write_data(folder / "data")
    return write_artifacts(folder)


def evaluation(folder, out):
    """Its command line, and what counts the answers there are."""
    config = {
        "model": str(folder / "backbone"),
        "tasks": ["ruler_niah_single_1"],
        "setups": [{"policy": ["full", "knorm", "random"], "budget": "8x"}],
        "output": str(out),
        "dtype": "float32",
        "device": "cpu",
        "data_dir": str(folder / "data"),
        "data": DATA,
        "lengths": [1300],
        "limit": 12,
        "cache_dir": str(folder / "cache"),
        "engine": {"chunk_size": 64},
    }
    path = out.parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["evaluate", "--config", str(path)], answers_in(out)


def answers_in(folder):
    """What reads the answers of a run, the unfinished left out."""

    def keys():
        lines = [p.read_text().splitlines() for p in (folder / "predictions").glob("*.jsonl")]
        return [line for of_file in lines for line in of_file if line.endswith("}")]

    return keys


def grid(folder, out):
    args = ["grid", "--model", str(folder / "backbone"), "--device", "cpu", "--count", "12"]
    args += ["--policies", "full", "knorm", "--bits", "16", "--ratios", "8", "--tokens", "700"]
    args += ["--max-new-tokens", "8", "--json-out", str(out / "grid.json")]

    return args, answers_in(out / "grid.answers")


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    monkeypatch.setattr(evaluate, "_start", fork_ranks)


ASKED = {evaluation: 36, grid: 24}


def nothing_left(group):
    """Whether all processes of a group end; the system may take a moment to clear them away."""
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def stopped(args, keys, number, log):
    """The answers of a run that is stopped once there are some. No process is left of it."""
    process = Forked(args, log, session=True)
    while not keys():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == STATUS[number], log.read_text()
    error = log.read_text()
    assert error.splitlines()[-1] == f"locret {args[0]}: {SAYS}" and "Traceback" not in error
    assert nothing_left(process.pid)
    return set(keys())


@pytest.mark.parametrize(("kind", "count"), [(evaluation, 1), (grid, 2)])
def test_a_run_that_sigterm_stops_goes_on(kind, count, folder, tmp_path):
    args, keys = kind(folder, tmp_path / "out")
    args += ["--processes", str(count)]
    before = stopped(args, keys, signal.SIGTERM, tmp_path / "first.txt")
    assert Forked(args, tmp_path / "again.txt").wait() == 0, (tmp_path / "again.txt").read_text()
    assert before < set(keys()) and len(set(keys())) == ASKED[kind]


def test_ctrl_c_ends_the_processes_too(folder, tmp_path):
    args, keys = evaluation(folder, tmp_path / "out")
    args += ["--processes", "2"]
    there = stopped(args, keys, signal.SIGINT, tmp_path / "log.txt")
    assert len(there) < ASKED[evaluation]
