"""Eviction policies by name."""

from typing import Any

from locret.policies.attention import H2OPolicy, TOVAPolicy
from locret.policies.base import LayerChunk, Policy
from locret.policies.expected_attention import ExpectedAttentionPolicy
from locret.policies.kvzip import KVzipPolicy
from locret.policies.locret import LocretPolicy
from locret.policies.plain import (
    FullPolicy,
    KeyDiffPolicy,
    KNormPolicy,
    RandomPolicy,
    StreamingLLMPolicy,
)
from locret.policies.sirllm import SirLLMPolicy
from locret.policies.snapkv import PyramidKVPolicy, SnapKVPolicy

__all__ = ["POLICIES", "LayerChunk", "Policy"]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        ExpectedAttentionPolicy,
        FullPolicy,
        H2OPolicy,
        KeyDiffPolicy,
        KNormPolicy,
        KVzipPolicy,
        LocretPolicy,
        PyramidKVPolicy,
        RandomPolicy,
        SirLLMPolicy,
        SnapKVPolicy,
        StreamingLLMPolicy,
        TOVAPolicy,
    )
}


def policy_in_words(
    name: str, tokenizer: Any = None, chat: bool = True, **arguments: Any
) -> str | Policy:
    """The policy of that name, as `locret.Engine` takes it: with arguments of its class and, where
    it reads words of its own, in those of the tokenizer (`Policy.words`)."""
    kind = POLICIES[name]
    own = {} if tokenizer is None else kind.words(tokenizer, chat)
    arguments = own | arguments
    return kind(**arguments) if arguments else name
