import functools
import os

import gguf
import hypothesis
import pytest
import torch

# How long an example takes says something about the machine, not about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

LONGEST = (
    "kernels/test_interpreted.py",
    "evaluation/test_harness.py",
    "serve/test_openai.py",
    "test_compiled.py",
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # the files are sorted here


def pytest_collection_modifyitems(config, items):
    moving = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if moving:  # another name in every process: pytest-xdist runs none of all tests then
        raise pytest.UsageError(f"tests named after an address in memory: {moving}; give ids")
    if hasattr(config, "workerinput"):
        _sort_files(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _sort_files(items):
    """The longest first, then those of many tests, lest one worker ends with a long file alone."""
    counts = {}
    for item in items:
        counts[item.path] = counts.get(item.path, 0) + 1
    items.sort(key=lambda it: (not it.path.as_posix().endswith(LONGEST), -counts[it.path]))


@pytest.fixture(scope="session", autouse=True)
def _gguf_files_are_parsed_once():
    """Not once a load: parsing is half of the time that loading `embedded:smollm2` takes."""
    read = functools.lru_cache(maxsize=1)(lambda path, *_: parse(path))
    parse = gguf.GGUFReader

    def reader(path):
        about = os.stat(path)
        return read(path, about.st_size, about.st_mtime_ns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", reader)
        yield
