"""Rotation tables that turn nothing, at no cost.

An attention layer applies the rotation that it is given. To get its queries and keys before RoPE we
give it cos = 1 and sin = 0; multiplying by these would still move all queries and keys through
memory five times. `IdentityTable` is an ordinary tensor of ones or zeros that knows what it holds:
a product with ones is the other factor, a product with zeros is zero, a sum with zeros is the other
term. Every other operation computes as usual, so that results never depend on it.
"""

from typing import Any

import torch
from torch import Tensor

_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_VIEWS = (
    Tensor.__getitem__,
    Tensor.unsqueeze,
    Tensor.float,
    Tensor.to,
    Tensor.repeat_interleave,
    torch.repeat_interleave,
)


class IdentityTable(Tensor):
    """A tensor all of whose values are `constant`, 0 or 1."""

    constant: int

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not kwargs and len(args) == 2 and function in _PRODUCTS + _SUMS:
            shortcut = _shortcut(function in _PRODUCTS, *args)
            if shortcut is not None:
                return shortcut
        plain = [arg.as_subclass(Tensor) if isinstance(arg, cls) else arg for arg in args]
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*plain, **(kwargs or {}))
        if function in _VIEWS and isinstance(args[0], cls) and isinstance(result, Tensor):
            return _table(result, args[0].constant)
        return result


def identity_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos = 1 and sin = 0 in the shapes, dtypes and on the devices of `cos` and `sin`."""
    return _table(torch.ones_like(cos), 1), _table(torch.zeros_like(sin), 0)


def _table(values: Tensor, constant: int) -> IdentityTable:
    table = values.as_subclass(IdentityTable)
    table.constant = constant
    return table


def _shortcut(product: bool, first: Any, second: Any) -> Tensor | None:
    """The result where it is one of the operands, or zeros that are known to be."""
    for table, other in ((first, second), (second, first)):
        if not isinstance(table, IdentityTable) or not isinstance(other, Tensor):
            continue
        if isinstance(other, IdentityTable) or torch.promote_types(table.dtype, other.dtype) != (
            other.dtype
        ):
            continue
        if torch.broadcast_shapes(table.shape, other.shape) != other.shape:
            continue
        if product and table.constant == 0:
            return table if table.dtype == other.dtype else None
        if product == (table.constant == 1):
            return other
    return None
