"""The command `serve` forked, which saves its imports; `command.py` starts it as users do."""

import json
import signal
import tempfile
import time
from pathlib import Path

from tests.forked import Forked


class Served:
    """`python -m locret serve`, until it says where it serves.

    Args:
        args: of the command.
        cwd: the folder that it runs in.
    """

    def __init__(self, *args, cwd=None):
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name, "log.txt")
        self.process = Forked(["serve", "--no-ui", *args, "--port", "0"], self.log, cwd=cwd)
        while self.process.poll() is None:
            for line in self.log.read_text(encoding="utf-8").splitlines():
                if '"serving at ' in line and line.endswith("}"):  # others log what they like
                    self.url = json.loads(line)["message"].split()[-1]
                    return
            time.sleep(0.02)
        raise AssertionError(f"the command ended: {self.log.read_text(encoding='utf-8')}")

    def stop(self):
        """Ask it to end; its status and what it logged."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30), self.log.read_text(encoding="utf-8")
