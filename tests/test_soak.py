"""200 requests in a row through one engine: same answers, same memory, whatever became of each."""

import ctypes
import gc
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import locret
from tests.tiny_models import prompt, tiny_heads, tiny_model

REQUESTS = 200
WARM_UP = 40  # requests until what is made once has been made
CANCEL_EVERY = 5
SETTINGS = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
PAGE = 4096
SLACK_BYTES = 64 * 2**10  # of Python objects: interned strings, code paths met for the first time
SLACK_RESIDENT = 16 * 2**20  # what the allocators below Python may keep


class Cancelled(Exception):
    pass


class Cancel(BaseStreamer):
    """Raises when a given number of tokens has come; the prompt, put first, is none."""

    def __init__(self, after):
        self.left = after

    def put(self, value):
        if value.dim() > 1:
            return
        if self.left == 0:
            raise Cancelled
        self.left -= 1

    def end(self):
        pass


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def requests():
    """(prompt, new tokens, tokens after which it is cancelled or None), always the same."""
    rng = random.Random(0)
    for i in range(REQUESTS):
        length = rng.choice([1, 5, 20, rng.randrange(2, 120)])
        new = rng.randrange(1, 9)
        cancelled = rng.randrange(new) if i % CANCEL_EVERY == CANCEL_EVERY - 1 else None
        yield prompt(length, seed=i), new, cancelled


def engine_for(model):
    return locret.Engine(model, heads=tiny_heads(model), **SETTINGS)


def ask(engine, ids, new, streamer=None):
    return engine.generate(ids, max_new_tokens=new, do_sample=False, streamer=streamer)


def tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def resident():
    """Bytes of this process in memory; 0 where /proc does not say. The allocator first gives back
    what it keeps of memory that was freed."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return int(statm.read_text().split()[1]) * PAGE


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_answers_are_a_fresh_engines_after_any_number_of_requests(model):
    engine = engine_for(model)
    for ids, new, cancelled in requests():
        if cancelled is None:
            assert torch.equal(ask(engine, ids, new), ask(engine_for(model), ids, new))
        else:
            with pytest.raises(Cancelled):
                ask(engine, ids, new, Cancel(cancelled))
            assert hooks(model) == 0


def growth():
    """How many more tensors there are after the requests than after the first of them, how many
    more bytes of Python objects and of the process."""
    engine = engine_for(tiny_model("llama"))
    tracemalloc.start()
    for i, (ids, new, cancelled) in enumerate(requests()):
        if i == WARM_UP:
            before = tensors(), tracemalloc.get_traced_memory()[0], resident()
        try:
            ask(engine, ids, new, None if cancelled is None else Cancel(cancelled))
        except Cancelled:
            continue
    del ids
    after = tensors(), tracemalloc.get_traced_memory()[0], resident()
    return [now - then for now, then in zip(after, before, strict=True)]


def test_memory_returns_to_its_level():
    """In a process of its own: what tests before it left running would be counted too."""
    code = "from tests.test_soak import growth; print(*growth())"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0
    count, objects, memory = map(int, done.stdout.split())
    assert count <= 0
    assert objects < SLACK_BYTES
    if sys.platform == "linux":
        assert memory < SLACK_RESIDENT
