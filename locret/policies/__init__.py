"""Eviction policies by name."""

from typing import Any

from locret.policies.base import LayerChunk, Policy
from locret.policies.expected_attention import ExpectedAttentionPolicy
from locret.policies.full import FullPolicy
from locret.policies.h2o import H2OPolicy
from locret.policies.keydiff import KeyDiffPolicy
from locret.policies.knorm import KNormPolicy
from locret.policies.kvzip import KVzipPolicy
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
