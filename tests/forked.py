"""Commands in processes of their own that are forked, so that they need not import anything."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from locret import cli


class Forked:
    """`python -m locret ARGUMENTS` with the methods of `subprocess.Popen` that tests use.

    Args:
        arguments: of the command.
        log: what the process writes goes into this file.
        environment: on top of this process's.
        session: make it the leader of a session, and so of a group, of its own.
        cwd: the folder that it runs in.
    """

    def __init__(self, arguments, log: Path, environment=(), session=False, cwd=None):
        self.log = log
        log.touch()
        given = (list(map(str, arguments)), log, dict(environment), session, cwd or os.getcwd())
        self.process = multiprocessing.get_context("fork").Process(target=_command, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        self.process.terminate()

    def kill(self):
        self.process.kill()

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("locret", timeout)
        return self.process.exitcode


def _command(arguments, log, environment, session, cwd):
    os.environ.update(environment)
    os.chdir(cwd)
    if session:
        os.setsid()
    file = log.open("a", buffering=1)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the parent's threads are not there after a fork
    sys.exit(cli.main(arguments))


def fork_ranks(arguments, rank, count, log):
    """What `locret.evaluation.evaluate` starts, forked: for a test to put in its place."""
    about = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    return Forked(arguments, log, about)
