"""Matplotlib, loaded only by those who draw."""

import importlib.util
from pathlib import Path
from typing import Any

from locret.system.files import check_file


def plotting() -> Any:
    """`matplotlib.pyplot` without a screen.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures need the package matplotlib: pip install 'locret[eval]'")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check(path: Path) -> None:
    """Refuse a figure that could not be drawn in the end.

    Raises:
        ValueError: matplotlib is not installed or does not write such files, or it is a folder.
    """
    kinds = sorted(plotting().figure().canvas.get_supported_filetypes())
    plotting().close()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{str(path)!r}: a figure's name ends in one of {', '.join(kinds)}")
    check_file(path, "the figure")


def save(figure: Any, path: Path) -> Path:
    """Write a figure in the format that the path's ending names, and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plotting().close(figure)
    return path
