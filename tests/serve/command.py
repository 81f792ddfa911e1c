"""The command `serve` as a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Command:
    """`python -m locret serve`, until it says where it serves.

    Args:
        args: of the command.
        cwd: the folder that it runs in.
    """

    def __init__(self, *args, cwd=ROOT):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "locret", "serve", *map(str, args), "--port", "0", "--no-ui"],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in self.process.stderr:  # other packages log what they like
            if '"serving at ' in line:
                self.url = json.loads(line)["message"].split()[-1]
                return
        raise AssertionError("the command ended")

    def stop(self):
        """Ask it to end; its status and what it logged."""
        self.process.send_signal(signal.SIGTERM)
        _, logged = self.process.communicate(timeout=30)
        return self.process.returncode, logged
