"""Eviction policies by name.

To add one, write a class with a `name` and a `score` (`base`) in a file here: every file of this
package is read, and every class in it that has a name is a policy.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from locret.policies.base import LayerChunk, LocretPolicy, Policy

__all__ = ["POLICIES", "LayerChunk", "LocretPolicy", "Policy", "chosen_policy", "policy_in_words"]


def _named(kind: type[Policy]) -> Iterator[type[Policy]]:
    for each in kind.__subclasses__():
        if "name" in vars(each):
            yield each
        yield from _named(each)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

POLICIES = {kind.name: kind for kind in sorted(_named(Policy), key=lambda kind: kind.name)}


def chosen_policy(given: str | None, has_heads: bool, need: str | None = None) -> str:
    """The name of the policy that a user means: the one given, else the one that heads score for,
    else that which keeps all.

    Args:
        need: what asks for scores, in words, such as "budget is 40"; None = nothing does.

    Raises:
        ValueError: something asks for scores, and there is neither a policy nor heads.
    """
    policy = given or (LocretPolicy.name if has_heads else None)
    if policy is None and need is not None:
        raise ValueError(
            f"{need}, but nothing scores units, so that all would be kept; give heads, or a policy "
            "that needs none, such as keydiff"
        )
    return policy or "full"


def policy_in_words(
    name: str, tokenizer: Any = None, chat: bool = True, **arguments: Any
) -> str | Policy:
    """The policy of that name, as `locret.Engine` takes it: with arguments of its class and, where
    it reads words of its own, in those of the tokenizer (`Policy.words`)."""
    kind = POLICIES[name]
    own = {} if tokenizer is None else kind.words(tokenizer, chat)
    arguments = own | arguments
    return kind(**arguments) if arguments else name
