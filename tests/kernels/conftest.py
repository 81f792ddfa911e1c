"""The kernels themselves run on a GPU, or on the CPU in Triton's interpreter: there in a process of
its own (`test_interpreted.py`), because the interpreter must be asked for before any import."""

from itertools import groupby, product

import pytest
import torch

from locret.kernels.dispatch import INTERPRETED

if INTERPRETED:
    collect_ignore_glob = ["test_interpreted.py", "test_twins.py", "test_compiling.py"]
elif torch.cuda.is_available():
    collect_ignore_glob = ["test_interpreted.py"]
else:
    collect_ignore_glob = ["test_kernel_*.py"]


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by marks
def pytest_collection_modifyitems(items):
    """On a GPU these tests are the kernels' own, and `gpu` says so. In the interpreter, which is
    slow, stacked parameters are combined fewer times."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.name.startswith("test_kernel_"):
                item.add_marker(pytest.mark.gpu)
    if INTERPRETED:
        functions = groupby(list(items), lambda item: item.function)
        items[:] = [item for _, of_one in functions for item in _chosen(list(of_one))]


def _chosen(items):
    """Of a test with stacked parameters, as many combinations as show every value (of two stacks)
    or every pair of values (of three)."""
    sizes = [len(mark.args[1]) for mark in items[0].iter_markers("parametrize")]
    if len(sizes) < 2:
        return items
    places = product(*map(range, sizes))
    return [item for item, at in zip(items, places, strict=True) if sum(at) % min(sizes) == 0]


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
