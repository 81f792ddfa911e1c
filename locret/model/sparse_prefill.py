"""Prefill that looks at few columns and diagonals: MInference (arXiv 2407.02490), a baseline.

The kernel is that of the package `minference`; which columns ("vertical") and diagonals ("slash") a
head looks at is estimated here as there, from the attention of the prompt's last queries. Every
head looks at as many as the package gives to heads for which no pattern was searched. The cache is
the full one: this saves time, not memory.

B batch, H KV heads, G query heads a KV head, T tokens, D head size.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

PACKAGE = "minference"
VERTICAL, SLASH = 1000, 6096
"""Columns and diagonals that a head looks at."""

LAST = 64  # queries that are asked
FIRST, NEAR = 30, 100  # columns and diagonals that every head looks at


def why_not(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Why the package's kernel cannot run heads of `size` channels there; None if it can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"the package {PACKAGE} is not installed"
    version = _version(PACKAGE)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return (
            f"{PACKAGE} {version} needs a CUDA device and half precision, and the model is {dtype} "
            f"on {device}"
        )
    if size > 128:
        return f"{PACKAGE} {version} takes heads of at most 128 channels; these have {size}"
    try:
        _kernel()
    except Exception as error:  # whatever a package does when it is imported
        return (
            f"{PACKAGE} {version} cannot be imported beside torch {torch.__version__} and "
            f"transformers {_version('transformers')}: {type(error).__name__}: {error}"
        )
    return None


def takes(query: Tensor, key: Tensor) -> bool:
    """Whether this is a prompt that is read at once, and long enough to be asked."""
    return LAST <= query.shape[2] == key.shape[2]


def attend_sparsely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    vertical: int = VERTICAL,
    slash: int = SLASH,
) -> Tensor:
    """Causal attention of a prompt over `vertical` columns and `slash` diagonals for each head.

    Args:
        query: [B, H*G, T, D], rotated. key, value: [B, H, T, D], rotated; T at least `LAST`.
        scaling: softmax scale.

    Returns:
        [B, T, H*G, D].
    """
    run, group = _kernel(), query.shape[1] // key.shape[1]
    query = query * (scaling * query.shape[-1] ** 0.5)  # the kernel divides by the root of D
    outputs = []
    for head, queries in enumerate(query.split(group, dim=1)):  # what the last queries see is large
        keys, values = (
            x[:, head : head + 1].expand(-1, group, -1, -1).contiguous() for x in (key, value)
        )
        seen = _seen_by_the_last(queries, keys)
        columns, distances = _columns(seen, vertical), _distances(seen, slash)
        outputs.append(run(queries.contiguous(), keys, values, columns, distances))
    return torch.cat(outputs, dim=1).transpose(1, 2).contiguous()


def _seen_by_the_last(query: Tensor, key: Tensor) -> Tensor:
    """Attention of the last queries, [B, G, LAST, T] float32."""
    last, length = query[:, :, -LAST:], key.shape[2]
    logits = (last @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    slot = torch.arange(length, device=key.device)
    return logits.masked_fill(slot > slot[-LAST:, None], -torch.inf).softmax(dim=-1)


def _columns(seen: Tensor, count: int) -> Tensor:
    """The slots that were seen most, and the first ones, [B, G, `count`] long."""
    total = seen.sum(dim=2)
    total[..., :FIRST] = torch.inf
    return total.topk(min(max(count, FIRST), total.shape[-1])).indices


def _distances(seen: Tensor, count: int) -> Tensor:
    """How far back was seen most, and the nearest, [B, G, `count`] long; 0 = a query's own slot."""
    length = seen.shape[3]
    slot = torch.arange(length, device=seen.device)
    distance = (slot[-LAST:, None] - slot).clamp(min=0)  # what comes later was not seen
    total = seen.new_zeros(*seen.shape[:2], length)
    total.scatter_add_(2, distance.expand(seen.shape).flatten(2), seen.flatten(2))
    total[..., :NEAR] = torch.inf
    return total.topk(min(max(count, NEAR), length)).indices


def _kernel() -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    from minference import vertical_slash_sparse_attention

    return vertical_slash_sparse_attention


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"
