"""Eviction policies by name."""

from locret.policies.base import LayerChunk, Policy
from locret.policies.expected_attention import ExpectedAttentionPolicy
from locret.policies.full import FullPolicy
from locret.policies.h2o import H2OPolicy
from locret.policies.keydiff import KeyDiffPolicy
from locret.policies.knorm import KNormPolicy
from locret.policies.locret import LocretPolicy
from locret.policies.pyramidkv import PyramidKVPolicy
from locret.policies.random import RandomPolicy
from locret.policies.sirllm import SirLLMPolicy
from locret.policies.snapkv import SnapKVPolicy
from locret.policies.streaming_llm import StreamingLLMPolicy
from locret.policies.tova import TOVAPolicy

__all__ = ["POLICIES", "LayerChunk", "Policy"]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        ExpectedAttentionPolicy,
        FullPolicy,
        H2OPolicy,
        KeyDiffPolicy,
        KNormPolicy,
        LocretPolicy,
        PyramidKVPolicy,
        RandomPolicy,
        SirLLMPolicy,
        SnapKVPolicy,
        StreamingLLMPolicy,
        TOVAPolicy,
    )
}
