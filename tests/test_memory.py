"""Freed memory is kept where the allocator is glibc's and nobody has said otherwise."""

import ctypes
import os

import pytest

from locret.system import memory


class Library:
    """Stands in for the C library."""

    def __init__(self, taken=1):
        self.calls, self._taken = {}, taken

    def mallopt(self, name, value):
        self.calls[name] = value
        return self._taken


@pytest.fixture
def without_settings(monkeypatch):
    for name in [*os.environ]:
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)


@pytest.mark.parametrize("taken", [0, 1])
def test_freed_memory_is_kept(without_settings, monkeypatch, taken):
    library = Library(taken)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert memory.keep_freed_memory() == bool(taken)
    assert library.calls[-3] == 2**25


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_user_s_own_settings_stay(without_settings, monkeypatch, name):
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setenv(name, "1")
    assert not memory.keep_freed_memory() and not library.calls


def test_other_allocators_are_left_alone(without_settings, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
