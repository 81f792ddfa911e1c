"""Eviction policies by name."""

from locret.policies.base import LayerChunk, Policy
from locret.policies.full import FullPolicy
from locret.policies.locret import LocretPolicy
from locret.policies.random import RandomPolicy
from locret.policies.streaming_llm import StreamingLLMPolicy

__all__ = ["POLICIES", "LayerChunk", "Policy"]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (FullPolicy, LocretPolicy, RandomPolicy, StreamingLLMPolicy)
}
