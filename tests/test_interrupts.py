"""What SIGINT and SIGTERM do to a command, and with which status it leaves."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from locret import cli
from locret.system import interrupts
from locret.system.interrupts import Stopped, delayed, raised, run_command
from tests.signals import STATUS, handlers  # noqa: F401 - used by every test

ROOT = Path(__file__).resolve().parents[1]
both = pytest.mark.parametrize("number", STATUS)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # where Python looks for signals


@both
def test_a_signal_ends_a_command_with_its_status_and_one_line(number, capsys):
    assert run_command("name", lambda: send(number), note="stopped here") == STATUS[number]
    assert capsys.readouterr().err == "name: stopped here\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@both
def test_what_fails_on_the_way_out_does_not_hide_the_signal(number, capsys):
    def command():
        try:
            send(number)
        finally:
            raise ValueError("torn down halfway")

    assert run_command("name", command) == STATUS[number]
    assert capsys.readouterr().err == "name: stopped\n"


def test_a_library_that_makes_an_exit_of_ctrl_c_does_not_hide_it(capsys):
    def command():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1) from None

    assert run_command("name", command) == 130


def test_other_exits_and_errors_are_as_before(capsys):
    def leave():
        raise SystemExit(5)

    with pytest.raises(SystemExit, match="5"):
        run_command("name", leave)
    with pytest.raises(TypeError):
        run_command("name", lambda: len(5))
    assert run_command("name", lambda: int("x")) == 2
    assert capsys.readouterr().err.startswith("name: invalid literal")
    assert run_command("name", lambda: None) == 0


def lost(number):
    """A signal whose exception goes no further, as in `__del__`."""
    with pytest.raises(Stopped):
        send(number)


@both
def test_a_signal_comes_through_after_one_that_was_lost(number, monkeypatch):
    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", 0)

    def command():
        lost(number)
        send(number)

    assert run_command("name", command) == STATUS[number]


def test_a_signal_sent_twice_at_once_breaks_nothing_off():
    """As `timeout` sends it: to the process, and to its group."""

    def command():
        lost(signal.SIGTERM)
        send(signal.SIGTERM)

    assert run_command("name", command) == 0


@both
def test_a_signal_waits_for_what_must_not_be_broken_off(number):
    done = []
    with raised():
        with pytest.raises(Stopped), delayed():
            send(number)
            done.append(True)
        assert done


@both
def test_a_signal_that_the_process_was_started_to_ignore_is_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    assert run_command("name", lambda: send(number)) == 0
    assert signal.getsignal(number) is signal.SIG_IGN


@both
def test_a_forked_process_ends_as_others_do(number):
    """Lest those that load data for a training leave with a status that Torch takes for a crash."""
    with raised():
        child = os.fork()
        if child == 0:
            try:
                send(number)
            except KeyboardInterrupt:
                os._exit(7)
            finally:
                os._exit(8)
        status = os.waitpid(child, 0)[1]
    if number == signal.SIGINT:
        assert os.WEXITSTATUS(status) == 7
    else:
        assert os.WTERMSIG(status) == signal.SIGTERM


def test_a_command_runs_in_a_thread_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(run_command("name", lambda: None)))
    thread.start()
    thread.join()
    assert found == [0]


@pytest.mark.parametrize("seconds", [0.3, 1.5])
@pytest.mark.parametrize("module", ["locret", "trainers.fit"])
def test_an_interrupted_start_leaves_no_traceback(module, seconds):
    """While packages are imported, which takes seconds."""
    child = subprocess.Popen(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Not ignored, as it is in the background of a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=120)
    assert child.returncode in (-signal.SIGINT, 130, 0)
    assert "Traceback" not in told


GOES_ON = "stopped; the same command goes on where it stopped"


@both
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"command": "generate"}, "stopped"),
        ({"command": "needle", "json_out": None}, "stopped"),
        ({"command": "needle", "json_out": "o.json"}, GOES_ON),
        ({"command": "grid", "json_out": "o.json"}, GOES_ON),
        ({"command": "evaluate"}, GOES_ON),
        ({"command": "lm_eval"}, "stopped"),
        ({"command": "reproduce"}, "stopped"),
    ],
    ids=lambda given: "_".join(map(str, given.values())) if isinstance(given, dict) else "",
)
def test_every_command_says_whether_it_goes_on(number, given, says, monkeypatch, capsys):
    namespace = argparse.Namespace(run=lambda _: send(number), **given)
    monkeypatch.setattr(cli, "_parsed", lambda _: namespace)
    assert cli.main([]) == STATUS[number]
    assert capsys.readouterr().err == f"locret {given['command']}: {says}\n"
