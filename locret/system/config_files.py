"""Configuration files by name: the user's own, and those in configs/.

`configs` is a folder beside this package in a source tree, and inside it where it was installed
(`[tool.setuptools.package-dir]` in pyproject.toml).
"""

from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = PACKAGE / "configs"
CONFIGS = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "configs"
SUFFIX = ".yaml"


def find_config(name: str, groups: Sequence[str] = (".",)) -> Path:
    """The file of this name, with or without .yaml: the user's own, else one of ours.

    Args:
        groups: folders within configs/ to look in.

    Raises:
        ValueError: there is no such file; lists those of the first group.
    """
    for folder in (Path(), *(CONFIGS / group for group in groups)):
        for path in (folder / name, folder / f"{name}{SUFFIX}"):
            if path.is_file():
                return path
    known = ", ".join(sorted(path.name for path in (CONFIGS / groups[0]).glob(f"*{SUFFIX}")))
    raise ValueError(
        f"config {name} is no file, nor one of {Path('configs', groups[0])}: {known or 'none'}; "
        "give one of these, or the path of a file of your own"
    )
