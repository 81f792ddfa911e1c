"""Every benchmark command that the documentation shows is understood."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [
    line for block in BLOCKS for line in block.splitlines() if line.startswith("python -m ")
]


def test_commands_are_shown():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_is_understood(command):
    module, *args = shlex.split(command)[2:]
    given = importlib.import_module(module)._parser().parse_args(args)
    assert given.out is not None
