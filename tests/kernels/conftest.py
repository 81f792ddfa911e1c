"""The kernels themselves run on a GPU, or on the CPU in Triton's interpreter: there in a process of
its own (`test_interpreted.py`), because the interpreter must be asked for before any import."""

import pytest
import torch

from locret.kernels.dispatch import INTERPRETED

if INTERPRETED:
    collect_ignore_glob = ["test_interpreted.py", "test_twins.py", "test_assembly.py"]
elif torch.cuda.is_available():
    collect_ignore_glob = ["test_interpreted.py"]
else:
    collect_ignore_glob = ["test_kernel_*.py"]


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
