"""Eviction policies by name.

To add one, write a class with a `name` and a `score` (`base`) in a file here: every file of this
package is read, and every class in it that has a name is a policy.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from locret.policies.base import LayerChunk, LocretPolicy, Policy

__all__ = ["POLICIES", "LayerChunk", "LocretPolicy", "Policy", "policy_in_words"]


def _named(kind: type[Policy]) -> Iterator[type[Policy]]:
    for each in kind.__subclasses__():
        if "name" in vars(each):
            yield each
        yield from _named(each)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

POLICIES = {kind.name: kind for kind in sorted(_named(Policy), key=lambda kind: kind.name)}


def policy_in_words(
    name: str, tokenizer: Any = None, chat: bool = True, **arguments: Any
) -> str | Policy:
    """The policy of that name, as `locret.Engine` takes it: with arguments of its class and, where
    it reads words of its own, in those of the tokenizer (`Policy.words`)."""
    kind = POLICIES[name]
    own = {} if tokenizer is None else kind.words(tokenizer, chat)
    arguments = own | arguments
    return kind(**arguments) if arguments else name
