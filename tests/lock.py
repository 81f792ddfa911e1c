"""The versions that locret is tested with: `python -m tests.lock lowest | newer`.

lowest   the lower bounds of pyproject.toml as pins, for `pip install --constraint`
newer    what is installed in a newer version than constraints.txt names, one line a package
"""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def direct() -> list[Requirement]:
    """What pyproject.toml asks for itself, in all extras."""
    extras = PROJECT["optional-dependencies"].values()
    asked = [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]
    found = [Requirement(text) for text in dict.fromkeys(asked)]
    return [each for each in found if each.name != PROJECT["name"]]


def lock() -> list[Requirement]:
    """The pins of constraints.txt, each perhaps for some machines or Pythons only."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked_here() -> dict[str, str]:
    """Version by package that constraints.txt gives this machine and Python."""
    here = [pin for pin in lock() if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): version_of(pin, "==") for pin in here}


def version_of(requirement: Requirement, operator: str) -> str:
    """The one version that a requirement names with this operator."""
    (version,) = [each.version for each in requirement.specifier if each.operator == operator]
    return version


def lowest() -> list[str]:
    """The lower bounds as pins."""
    return [f"{each.name}=={version_of(each, '>=')}" for each in direct()]


def installed() -> dict[str, Version]:
    """Version by package. What a build appends (2.13.0+cpu) makes it no other version."""
    packages = importlib.metadata.distributions()
    return {
        canonicalize_name(each.metadata["Name"]): Version(Version(each.version).public)
        for each in packages
    }


def newer() -> list[str]:
    """What is installed in a newer version than the lock names."""
    found = installed()
    return [
        f"{name} {found[name]}, tested with {version}"
        for name, version in sorted(locked_here().items())
        if name in found and found[name] > Version(version)
    ]


if __name__ == "__main__":
    print("\n".join({"lowest": lowest, "newer": newer}[sys.argv[1]]()))
