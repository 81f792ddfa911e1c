"""constraints.txt pins all that is installed, and pyproject.toml states what was run."""

import importlib.metadata
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import lock

LOCKED = lock.locked_here()


def test_every_line_is_a_version_of_a_package():
    for pin in lock.lock():
        assert [each.operator for each in pin.specifier] == ["=="], pin
        assert pin.url is None and not pin.extras, pin


@pytest.mark.parametrize("wanted", lock.direct(), ids=str)
def test_what_we_ask_for_is_pinned_within_our_bounds(wanted):
    if wanted.marker is not None and not wanted.marker.evaluate():
        pytest.skip("not for this machine")
    assert wanted.specifier.contains(LOCKED[canonicalize_name(wanted.name)])


def needed_here():
    """Names of all packages that locret with all extras brings along, as they are installed."""
    found, left = set(), [*lock.direct()]
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        here = wanted.marker is None or any(
            wanted.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)
        )
        if (name, *wanted.extras) in found or not here:
            continue
        found.add((name, *wanted.extras))
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        for text in asked:
            further = Requirement(text)
            extras = ("", *wanted.extras)
            if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in extras):
                further.marker = None
                left.append(further)
    return {name for name, *_ in found}


def is_locked_environment():
    found = lock.installed()
    return all(found.get(name, Version(pin)) == Version(pin) for name, pin in LOCKED.items())


@pytest.mark.skipif(not is_locked_environment(), reason="other versions bring other packages along")
def test_every_package_that_comes_along_is_pinned():
    assert needed_here() - set(LOCKED) - {"pip"} == set()


def test_transformers_ends_at_the_first_minor_that_was_not_run():
    (wanted,) = [each for each in lock.direct() if each.name == "transformers"]
    major, minor, *_ = Version(LOCKED["transformers"]).release
    assert lock.version_of(wanted, "<") == f"{major}.{minor + 1}"


def test_the_pythons_are_those_that_were_run():
    classified = re.findall(r":: (3\.\d+)", "\n".join(lock.PROJECT["classifiers"]))
    assert lock.PROJECT["requires-python"] == f">={classified[0]}"
    mypy_and_ruff = (lock.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'python_version = "{classified[0]}"' in mypy_and_ruff
    assert f'target-version = "py{classified[0].replace(".", "")}"' in mypy_and_ruff
    makefile = (lock.ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"needs Python {classified[0]} or newer" in makefile
    assert f"TORCH ?= {LOCKED['torch']}" in makefile


def test_newer_versions_are_told():
    class Package:
        def __init__(self, name, version):
            self.metadata, self.version = {"Name": name}, version

    found = [Package("Transformers", "99.0"), Package("torch", LOCKED["torch"] + "+cpu")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "distributions", lambda: found)
        assert lock.newer() == [f"transformers 99.0, tested with {LOCKED['transformers']}"]


def test_lower_bounds_are_pins_for_pip():
    done = subprocess.run(
        [sys.executable, "-m", "tests.lock", "lowest"],
        cwd=lock.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    pins = [Requirement(line) for line in done.stdout.splitlines()]
    assert len(pins) == len({pin.name for pin in pins}) >= 20
