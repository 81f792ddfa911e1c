"""Locret: long contexts in little memory, by trained retaining heads on a frozen backbone."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from locret.cache.cache import RetainedCache
    from locret.cache.recall import Recall
    from locret.engine.engine import Engine
    from locret.heads.heads import HeadsConfig, RetainingHeads
    from locret.policies import POLICIES, LayerChunk, Policy

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "Engine",
    "HeadsConfig",
    "LayerChunk",
    "Policy",
    "Recall",
    "RetainedCache",
    "RetainingHeads",
]

_PLACES = {
    "Engine": "locret.engine.engine",
    "HeadsConfig": "locret.heads.heads",
    "LayerChunk": "locret.policies",
    "POLICIES": "locret.policies",
    "Policy": "locret.policies",
    "Recall": "locret.cache.recall",
    "RetainedCache": "locret.cache.cache",
    "RetainingHeads": "locret.heads.heads",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: commands say what is wrong with their
    arguments, and obey Ctrl-C, before torch is imported."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
