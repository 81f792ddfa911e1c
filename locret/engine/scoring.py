"""What ranks units in an engine: the policy, and heads that fit the model."""

import copy
from typing import Any

from locret.heads.heads import RetainingHeads
from locret.model.adapters import has_adapter, warn_without
from locret.model.backbone import Backbone
from locret.policies import POLICIES, LocretPolicy, Policy


def scoring_heads(policy: str | Policy, heads: RetainingHeads | None) -> RetainingHeads | None:
    """The heads whose record says what "auto" means: the policy's own, else those given.
    ValueError: what is given is not heads, or no policy."""
    if policy is None:
        raise ValueError(f"policy is None; expected a Policy, or one of {sorted(POLICIES)}")
    if heads is not None and not isinstance(heads, RetainingHeads):
        raise ValueError(
            f"heads is {heads!r:.80}; expected heads, as "
            "locret.RetainingHeads.from_pretrained(...) reads them from a folder or the Hub"
        )
    core = policy.core if isinstance(policy, Policy) else None
    return core.heads if isinstance(core, LocretPolicy) else heads


def make_policy(policy: str | Policy, heads: RetainingHeads | None, backbone: Backbone) -> Policy:
    """The policy of that name, or as it is given (the name: checked by `EngineConfig.of`), for the
    engine that calls this where it is made: heads of an adapter that the model lacks are warned of
    there. ValueError: heads are missing, or are for another backbone."""
    made, scoring = _made(policy, heads, backbone), scoring_heads(policy, heads)
    if scoring is not None and isinstance(made.core, LocretPolicy):
        warn_without(scoring, has_adapter(backbone.model), stacklevel=3)
    return made


def _made(policy: str | Policy, heads: RetainingHeads | None, backbone: Backbone) -> Policy:
    if heads is not None:
        _check_fit(heads, backbone)
    if isinstance(policy, Policy):
        if isinstance(policy.core, LocretPolicy):
            _check_fit(policy.core.heads, backbone)
        return policy
    if policy != LocretPolicy.name:
        return POLICIES[policy]()
    if heads is None:
        raise ValueError(
            "policy 'locret' needs trained heads: pass "
            "heads=locret.RetainingHeads.from_pretrained(...), or choose another policy"
        )
    return LocretPolicy(_fitting(heads, backbone))


def _check_fit(heads: RetainingHeads, backbone: Backbone) -> None:
    differences = heads.config.differences(backbone.geometry)
    if differences:
        raise ValueError(
            f"these heads are for another backbone ({heads.config.backbone or 'not recorded'}): "
            + "; ".join(differences)
        )


def _fitting(heads: RetainingHeads, backbone: Backbone) -> RetainingHeads:
    """The heads, each on its layer's device, in the backbone's dtype."""
    dtype: Any = backbone.model.dtype
    places = [(layer.device, dtype) for layer in backbone.retained]
    if any(
        (p.device, p.dtype) != place
        for head, place in zip(heads.layers, places, strict=True)
        for p in head.parameters()
    ):
        heads = copy.deepcopy(heads)  # the caller's stay as they are
        for head, place in zip(heads.layers, places, strict=True):
            head.to(*place)
    return heads
