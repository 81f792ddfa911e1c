"""Runs the files test_kernel_*.py beside this one in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def interpret(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_kernels_agree_with_their_twins_in_the_interpreter():
    probe = interpret(str(HERE / "interpreter_probe.py"))
    if probe.returncode:
        pytest.skip(f"Triton's interpreter does not work here: {probe.stderr.strip()[-200:]}")
    done = interpret("-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
