"""Matplotlib, loaded only by those who draw."""

import importlib.util
from pathlib import Path
from typing import Any


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


def save(figure: Any, path: Path) -> Path:
    """Write a figure in the format that the path's ending names, and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plotting().close(figure)
    return path
