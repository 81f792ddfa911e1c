"""Causal attention of the last tokens to all slots: one interface (`attend`), several ways.

eager       plain PyTorch, the twin that tests compare the others with; takes T x S memory a head.
sdpa        PyTorch's scaled_dot_product_attention, lower-right causal; runs everywhere.
cudnn       cuDNN, the fastest on NVIDIA GPUs from Ampere on, in half precision.
flash_attn  the flash-attn package (extra `flash`).
minference  a whole prompt by few columns and diagonals (MInference, arXiv 2407.02490), anything
            else by SDPA: a baseline. The kernel is that of the package `minference`; which columns
            ("vertical") and diagonals ("slash") a head looks at is estimated here as there, from
            the attention of the prompt's last queries. Every head looks at as many as the package
            gives to heads for which no pattern was searched.

Whatever the backend, layers with a softcap or with sinks are computed in plain PyTorch, a block of
queries at a time, and those with a window in blocks of one window by SDPA; bfloat16 by products of
matrices, where a CPU multiplies it faster than fused attention does.

B batch, H KV heads, G query heads a KV head, T new tokens, S slots, D head size.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from locret.model.hooks import PLAIN, Weighting

Backend = Literal["eager", "sdpa", "cudnn", "flash_attn", "minference"]

CUDNN_CHANNELS = 128  # of a head, at most

_BLOCK_ELEMENTS = 2**28  # of the logits that the eager backend has in memory at a time

_FEW = 32
"""Fewer new tokens are not worth products of matrices."""
_BLOCK = 128
"""New tokens that `attend_by_products` takes at a time: their logits shall fit a cache, and its
products be worth their calls."""
_LOGITS = 2**20
"""Logits that it has in memory at a time: it takes as many heads as have no more, at least one."""

_SAFE = 60.0
"""Logits of which exponentials and their sums are within the range of bfloat16."""

PACKAGE = "minference"
VERTICAL, SLASH = 1000, 6096
"""Columns and diagonals that a head looks at."""
LAST = 64  # queries that are asked
FIRST, NEAR = 30, 100  # columns and diagonals that every head looks at


def check_backend(backend: Any) -> None:
    """Refuse (ValueError) a backend of an unknown name."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is unknown; expected one of {get_args(Backend)}")


def available(backend: Backend, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Why a backend cannot run heads of `size` channels there; None if it can. ValueError: no
    backend of that name."""
    check_backend(backend)
    if backend in ("eager", "sdpa"):
        return None
    if backend == "minference":
        return why_not_sparse(device, dtype, size)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"it needs a CUDA device and half precision, and the model is {dtype} on {device}"
    if backend == "flash_attn":
        found = importlib.util.find_spec("flash_attn") is not None
        return None if found else "the package flash-attn is not installed (extra 'flash')"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "cuDNN attention needs an NVIDIA GPU of compute capability 8.0 or newer"
    if size % 8 or size > CUDNN_CHANNELS:
        most = f"at most {CUDNN_CHANNELS} channels, in eights"
        return f"cuDNN attention needs heads of {most}; these have {size}"
    return None


def fastest(device: torch.device, dtype: torch.dtype, size: int) -> Backend:
    """The backend to use where nobody chose one."""
    return "sdpa" if available("cudnn", device, dtype, size) else "cudnn"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    backend: Backend,
    empty: Tensor | None = None,
    weighting: Weighting = PLAIN,
) -> Tensor:
    """Causal attention of the last T of S slots: [B, T, H*G, D].

    Query t sees the slots 0 .. S - T + t (lower-right causal), but for the empty ones.

    Args:
        query: [B, H*G, T, D], rotated. key, value: [B, H, S, D], S >= T, rotated.
        scaling: softmax scale.
        backend: see the file's head.
        empty: [B, H] long: leading slots that hold nothing. A query always sees its own slot.
        weighting: what else decides the weights.
    """
    window = weighting.window
    if window is not None and key.shape[2] <= window:
        weighting = replace(weighting, window=None)
    elif window is not None and query.shape[2] > window:
        return _attend_blocks(query, key, value, scaling, backend, empty, weighting, window)
    if backend == "eager" or weighting.bends:
        output = _attend_eager(query, key, value, scaling, empty, weighting)
    elif backend == "flash_attn" and empty is None and weighting.plain:
        return _attend_flash(query, key, value, scaling)
    elif (
        backend == "minference"
        and empty is None
        and weighting.plain
        and is_whole_prompt(query, key)
    ):
        return attend_sparsely(query, key, value, scaling)
    elif empty is None and weighting.plain and multiplies_fast(query):
        output = attend_by_products(query, key, value, scaling)
    else:
        output = _attend_sdpa(query, key, value, scaling, empty, weighting.window)
    return output.transpose(1, 2).contiguous()


def _attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    backend: Backend,
    empty: Tensor | None,
    weighting: Weighting,
    window: int,
) -> Tensor:
    """A window's worth of queries at a time: none looks further back than another one."""
    new, slots = query.shape[2], key.shape[2]
    outputs = []
    for start in range(0, new, window):
        own = slots - new + start
        first, last = max(own - window + 1, 0), min(own + window, slots)
        left = None if empty is None else (empty - first).clamp(min=0)
        queries = query[:, :, start : start + window]
        keys, values = key[:, :, first:last], value[:, :, first:last]
        outputs.append(attend(queries, keys, values, scaling, backend, left, weighting))
    return torch.cat(outputs, dim=1)


def _attend_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    empty: Tensor | None,
    window: int | None,
) -> Tensor:
    new, slots = query.shape[2], key.shape[2]
    # SDPA's own is_causal is aligned upper-left, which is right only for a square.
    square = new == slots and new > 1
    mask: Any = None if square or new == 1 else causal_lower_right(new, slots)
    if empty is not None or window is not None:
        mask, square = _visible(query, key, empty, window), False
        if mask.dim() == 4:
            mask = mask.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        if query.is_cuda:  # no kernel takes a mask and groups, and the fallback takes T x S memory
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=square, scale=scaling, enable_gqa=True
    )


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    output: Tensor = flash_attn_func(q, k, v, softmax_scale=scaling, causal=True)
    return output  # it is lower-right causal by itself


def _attend_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    empty: Tensor | None,
    weighting: Weighting = PLAIN,
) -> Tensor:
    """[B, H*G, T, D], so many queries at a time that their logits fit `_BLOCK_ELEMENTS`."""
    new, slots = query.shape[2], key.shape[2]
    rows = max(1, _BLOCK_ELEMENTS // (query[:, :, 0, 0].numel() * slots))
    outputs = []
    for start in range(0, new, rows):
        end = min(start + rows, new)
        last = slots - new + end  # later slots are the future of all of them
        queries, keys, values = query[:, :, start:end], key[:, :, :last], value[:, :, :last]
        outputs.append(_eager_block(queries, keys, values, scaling, empty, weighting))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _eager_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    empty: Tensor | None,
    weighting: Weighting,
) -> Tensor:
    batch, heads, slots, size = key.shape
    new = query.shape[2]
    grouped = query.reshape(batch, heads, -1, new, size)
    logits = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)) * scaling
    if weighting.softcap is not None:
        logits = torch.tanh(logits / weighting.softcap) * weighting.softcap
    visible = _visible(query, key, empty, weighting.window)
    if visible.dim() == 4:
        visible = visible[:, :, None]
    logits = logits.masked_fill(~visible, -torch.inf)
    if weighting.sinks is not None:
        sinks = weighting.sinks.to(logits.dtype).reshape(1, heads, -1, 1, 1)
        logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], dim=-1)
    weights = logits.softmax(dim=-1, dtype=torch.float32)[..., :slots]
    output = torch.matmul(weights.to(value.dtype), value[:, :, None])
    return output.reshape(batch, -1, new, size)


def _visible(query: Tensor, key: Tensor, empty: Tensor | None, window: int | None) -> Tensor:
    """Which slots each query sees: bool [T, S], or [B, H, T, S] where some are empty."""
    new, slots = query.shape[2], key.shape[2]
    slot = torch.arange(slots, device=key.device)
    own = slot[slots - new :, None]
    mask = slot <= own
    if window is not None:
        mask = mask & (slot > own - window)
    if empty is not None:
        mask = (slot == own) | (mask & (slot >= empty[:, :, None, None]))
    return mask


def multiplies_fast(query: Tensor) -> bool:
    """Whether `attend_by_products` is faster than PyTorch's fused attention, of a CPU."""
    return query.shape[2] >= _FEW and multiplies_bfloat16(query)


def multiplies_bfloat16(x: Tensor) -> bool:
    """Whether products of matrices like `x` are faster than PyTorch's fused attention, of a CPU:
    that one multiplies bfloat16 at the speed of float32, unless the CPU has tiles (AMX)."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last T of S slots, some KV heads and a block of queries at a time:
    [B, H*G, T, D].

    Args:
        query: [B, H*G, T, D], rotated. key, value: [B, H, S, D], S >= T, rotated.
        scaling: softmax scale.
    """
    heads, slots, tokens = key.shape[1], key.shape[2], query.shape[2]
    queries = query.unflatten(1, (heads, -1)).flatten(0, 1)  # [B * H, G, T, D]
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    output = torch.empty_like(queries, memory_format=torch.contiguous_format)
    at_once = max(1, _LOGITS // (queries.shape[1] * min(_BLOCK, tokens) * slots))
    for first in range(0, len(keys), at_once):
        # One matrix is in memory as products read it whatever they take of it; several are copied.
        at = first if at_once == 1 else slice(first, first + at_once)
        _attend_heads(queries[at], keys[at], values[at], scaling, output[at])
    return output.view(query.shape)


def _attend_heads(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, output: Tensor
) -> None:
    """Attention of queries [..., G, T, D] to [..., S, D], written to `output`."""
    group, tokens, size = query.shape[-3:]
    # Products of bfloat16 are rounded to it, and the softmax is the same without the mean key:
    # logits are smaller then, and exact enough for models whose keys have large biases.
    exact = key.float()
    exact = (exact - exact.mean(dim=-2, keepdim=True)).mul_(scaling)
    largest, key = _largest(query) * _largest(exact), exact.to(key.dtype)
    weigh = _weigh if largest < _SAFE else _weigh_any
    future = query.new_full((_BLOCK, _BLOCK), -torch.inf).triu(1)
    for start in range(0, tokens, _BLOCK):
        end = min(start + _BLOCK, tokens)
        new, last = end - start, key.shape[-2] - tokens + end  # later slots are all future
        queries = query[..., start:end, :].reshape(*key.shape[:-2], -1, size)  # G * new
        logits = queries @ key[..., :last, :].transpose(-1, -2)
        logits.unflatten(-2, (group, new))[..., -new:].add_(future[:new, :new])
        weighed = weigh(logits, value[..., :last, :])
        output[..., start:end, :] = weighed.unflatten(-2, (group, new))


def _largest(vectors: Tensor) -> float:
    """The largest norm of some vectors [..., D]."""
    norms = torch.linalg.vector_norm(vectors.detach(), dim=-1, dtype=torch.float32)
    return float(norms.max())


def _weigh(logits: Tensor, value: Tensor) -> Tensor:
    """The softmax of logits of at most `_SAFE` times the values, in fewer passes than softmax
    takes; changes the logits."""
    weights = logits.exp_()
    return (weights @ value).div_(weights.sum(dim=-1, keepdim=True))


def _weigh_any(logits: Tensor, value: Tensor) -> Tensor:
    return logits.softmax(dim=-1) @ value


def why_not_sparse(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
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


def is_whole_prompt(query: Tensor, key: Tensor) -> bool:
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
