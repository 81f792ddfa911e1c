"""What transformers calls the cache: `cache` since 5.24, `past_key_values` before.

Hooks that run before a forward see the name its caller used, and stock code warns of the old name.
So every hook, call and output of a stock model goes through these functions.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

NAMES = ("cache", "past_key_values")
"""The newest first."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a model, decoder or attention layer, or None."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def as_before(layer: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What an attention layer ran with, as transformers 5.2 would have called it: with
    `past_key_values` and `cache_position`. For hooks of libraries written for it."""
    cache, new = cache_in(arguments), arguments["hidden_states"].shape[1]
    end = cache.get_seq_length(layer.layer_idx)
    return {"cache_position": torch.arange(end - new, end), **arguments, NAMES[-1]: cache}


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
    kind: Any = type(module)
    return {_name(kind, takes): cache}


@functools.cache
def _name(kind: Any, method: str) -> str:
    """A method of `**kwargs` alone reveals nothing, so that base classes are searched."""
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
