"""Decoder layers that keep their input alone, and are computed again for their gradients.

By the gradient checkpointing of stock layers, which asks that a layer is in training mode: here the
layer itself is, and no module below it, so that nothing drops out.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.checkpoint import checkpoint

from locret.model.hooks import without_compiling

_checkpoint = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def recomputing(layers: Iterable[Any]) -> Iterator[None]:
    """Until the block ends, `layers` keep nothing but their input for the backward pass, which has
    to take place inside the block.

    Args:
        layers: stock decoder layers, in evaluation mode.
    """
    given = {
        "gradient_checkpointing": True,
        "_gradient_checkpointing_func": _checkpoint,
        "training": True,
    }
    with contextlib.ExitStack() as stack:
        for layer in map(without_compiling, layers):
            own = vars(layer)
            before = {name: own[name] for name in given if name in own}
            stack.callback(_put_back, own, given, before)
            own.update(given)
        yield


def _put_back(own: dict[str, Any], given: dict[str, Any], before: dict[str, Any]) -> None:
    for name in given:
        own.pop(name, None)
    own.update(before)
