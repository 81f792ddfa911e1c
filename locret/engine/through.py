"""A model whose calls go through a function of ours, while the model itself is left as it is."""

import functools
from collections.abc import Callable
from typing import Any


def without_mask(run: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """A model's outputs for `inputs` whose `attention_mask` is stock `generate`'s to know: which
    slots of a row are empty, the cache knows."""
    return run(**inputs | {"attention_mask": None})


def seen_through(model: Any, through: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> Any:
    """`model`, whose calls go through `through(run, inputs)` first. The model itself is left as it
    is: what is returned is another object of a subclass, with the same attributes."""
    kind: Any = type(model)
    seen: Any = object.__new__(_seen_class(kind))
    object.__setattr__(seen, "__dict__", model.__dict__)
    object.__setattr__(seen, "_through", through)  # a slot of its own, not the model's attribute
    return seen


@functools.cache
def _seen_class(kind: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(kind.__call__, self)
        return run(*args, **kwargs) if args else self._through(run, kwargs)

    body = {"__call__": call, "__slots__": ("_through",), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)
