"""Locret: long contexts in little memory, by trained retaining heads on a frozen backbone."""

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
