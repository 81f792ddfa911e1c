"""Locret: long contexts in little memory, by trained retaining heads on a frozen backbone."""

from locret.cache import RetainedCache
from locret.generation import Engine
from locret.heads import HeadsConfig, RetainingHeads
from locret.policies import POLICIES, LayerChunk, Policy
from locret.recall import Recall

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
