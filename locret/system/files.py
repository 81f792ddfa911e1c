"""Files: configurations by name, files written whole or not at all and recognised by their content.

`configs` is a folder beside this package in a source tree, and inside it where it was installed
(`[tool.setuptools.package-dir]` in pyproject.toml).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = PACKAGE / "configs"
CONFIGS = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "configs"
SUFFIX = ".yaml"
EMPTY = "an empty path; give a name (is a shell variable unset?)"

_LOADED = {".safetensors", ".bin", ".pt", ".json"}
"""How files of an artifact end that are read when it is loaded."""


def check_named(name: object, what: str) -> None:
    """Refuse (ValueError) an empty text as the name of a file, a folder or a repository: as a path
    it would be the working directory."""
    if name == "":
        raise ValueError(f"{what} is {EMPTY}")


def find_config(name: str, groups: Sequence[str] = (".",)) -> Path:
    """The file of this name, with or without .yaml: the user's own, else one of ours.

    Args:
        groups: folders within configs/ to look in.

    Raises:
        ValueError: there is no such file, or the name is empty; lists those of the first group.
    """
    check_named(name, "config")
    for folder in (Path(), *(CONFIGS / group for group in groups)):
        for path in (folder / name, folder / f"{name}{SUFFIX}"):
            if path.is_file():
                return path
    known = ", ".join(sorted(path.name for path in (CONFIGS / groups[0]).glob(f"*{SUFFIX}")))
    raise ValueError(
        f"config {name} is no file, nor one of {Path('configs', groups[0])}: {known or 'none'}; "
        "give one of these, or the path of a file of your own"
    )


_PLAIN_LIST = re.compile(r"\[\n\s+([^\[\]{}]*?)\n\s*\]")
_LINE = re.compile(r",\n\s+")


def write_whole(path: Path, text: str) -> None:
    """Write aside, then rename: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def append_json(path: Path, rows: Iterable[Any]) -> None:
    """Add JSON Lines in one write, behind whatever a killed process left unfinished."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def check_file(path: Path | None, what: str) -> None:
    """Refuse a place that no file can be written to, before there is work to lose. Raises
    ValueError: it is a folder, or lies in something that is none."""
    if path is None:
        return
    around = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not around.is_dir():
        raise ValueError(f"{what} is {str(path)!r}, where no file can be written; give a file")


def as_json(value: Any) -> str:
    """Indented JSON whose lists of plain values stand on one line."""
    text = json.dumps(value, indent=1, default=str)
    # Within strings a line break is written as two characters, so that these are all indentation.
    return _PLAIN_LIST.sub(lambda found: f"[{_LINE.sub(', ', found[1])}]", text) + "\n"


def file_hash(path: Path) -> str:
    """The first 16 hex digits of a file's SHA-256."""
    found = path.stat()
    return _hash(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def folder_hash(folder: Path) -> str:
    """Of the names and contents of a folder's weights and their records: a model card that is
    corrected changes no answer."""
    files = sorted(path for path in folder.iterdir() if path.suffix in _LOADED and path.is_file())
    rows = [f"{path.name} {file_hash(path)}" for path in files]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]
