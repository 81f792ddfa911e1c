"""What transformers calls the cache: `cache` since 5.24, `past_key_values` before.

Hooks that run before a forward see the name its caller used, and stock code warns of the old name.
So every hook, call and output of a stock model goes through these functions.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

NAMES = ("cache", "past_key_values")
"""The newest first."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a model, decoder or attention layer, or None."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def with_old_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an attention layer with the cache under its old name too, for hooks of libraries
    that know no other."""
    return {**arguments, NAMES[-1]: cache_in(arguments)}


def cache_of(output: Any) -> Any:
    """The cache in what a model or stock `generate` returned.

    Raises:
        AttributeError: it holds none.
    """
    # The old name is an attribute of new outputs too, which warns.
    return output.cache if hasattr(output, NAMES[0]) else output.past_key_values


def as_argument(module: nn.Module, cache: Any, method: str = "forward") -> dict[str, Any]:
    """`{name: cache}`, under the name that a method of `module` takes.

    Args:
        method: "forward" or "generate".

    Raises:
        ValueError: the method takes no cache under either name.
    """
    # Stock `generate` takes any keyword and hands it on to this.
    takes = "prepare_inputs_for_generation" if method == "generate" else method
    return {_name(type(module), takes): cache}


@functools.cache
def _name(kind: type, method: str) -> str:
    """A wrapper of `**kwargs` alone says nothing, so that its base classes are asked."""
    for each in kind.__mro__:
        if method in vars(each):
            taken = inspect.signature(vars(each)[method]).parameters
            for name in NAMES:
                if name in taken:
                    return name
    raise ValueError(
        f"{kind.__name__}.{method} takes no cache: expected a parameter called "
        f"{' or '.join(map(repr, NAMES))}; is it a transformers causal language model?"
    )
