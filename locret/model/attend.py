"""Causal attention of new tokens over slots: one interface, several ways to compute it.

eager       plain PyTorch, the twin that tests compare the others with; takes T x S memory a head.
sdpa        PyTorch's scaled_dot_product_attention, lower-right causal; runs everywhere.
cudnn       cuDNN, the fastest on NVIDIA GPUs from Ampere on, in half precision.
flash_attn  the flash-attn package (extra `flash`).
minference  a whole prompt sparsely (`locret.model.sparse_prefill`), anything else by SDPA: a
baseline.

What is past, every new token sees: with `cudnn` and `sdpa` attention to it, a sequence at a time
where heads hold different numbers of units, is merged by log-sum-exp with that of the new tokens to
themselves, a causal square (`attend_past`); or all sequences take one call (`locret.model.ragged`).

Whatever the backend, layers with a softcap or with sinks are computed in plain PyTorch, a block of
queries at a time, and those with a window in blocks of one window by SDPA.

B batch, H KV heads, G query heads a KV head, T new tokens, S slots, D head size.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from locret.heads.quotas import is_on_grid
from locret.kernels import merge_attention
from locret.model import sparse_prefill
from locret.model.past import (
    Past,
    are_few,
    attend_by_products,
    attend_few,
    multiplies_fast,
    with_bias_in_channels,
)
from locret.model.ragged import attend_ragged, takes_flash, takes_ragged

Backend = Literal["eager", "sdpa", "cudnn", "flash_attn", "minference"]

SPLIT_FROM = 128  # new tokens; below that two calls and a merge cost more than one call

CUDNN_CHANNELS = 128  # of a head, at most

_BLOCK_ELEMENTS = 2**28  # of the logits that the eager backend has in memory at a time


@dataclass(frozen=True)
class Weighting:
    """What else decides a layer's attention weights, beside the softmax scale.

    Attributes:
        window: a query sees its own slot and the window - 1 before it; None = all.
        softcap: logits become softcap * tanh(logit / softcap); None = they stay as they are.
        sinks: [H*G], a logit for each query head that takes weight and gives no value; None = none.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.window is None and not self.bends

    def of_heads(self, which: slice) -> "Weighting":
        """That of some query heads."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[which])

    @property
    def bends(self) -> bool:
        """The softmax itself is another one, which fused attention does not compute."""
        return self.softcap is not None or self.sinks is not None


PLAIN = Weighting()


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
        return sparse_prefill.why_not(device, dtype, size)
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
        and sparse_prefill.takes(query, key)
    ):
        return sparse_prefill.attend_sparsely(query, key, value, scaling)
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


def attend_past(
    query: Tensor,
    pasts: Sequence[Past],
    new: tuple[Tensor, Tensor] | None,
    scaling: float,
    backend: Backend,
    weighting: Weighting = PLAIN,
) -> Tensor:
    """Causal attention of new tokens to themselves and to all of what is past: [B, T, H*G, D].

    Args:
        query: [B, H*G, T, D], rotated.
        pasts: what they all see, the oldest first.
        new: keys (rotated) and values [B, H, T, D]; None = those of a single token, which are the
            last of the last past.
        scaling, backend, weighting: as of `attend`; no window, and no softcap where a past has a
            bias.
    """
    if any(past.bias is not None for past in pasts):
        wide = with_bias_in_channels(query, pasts, new, scaling)
        if backend == "cudnn" and wide[0].shape[3] > CUDNN_CHANNELS:
            backend = "sdpa"
        return attend_past(*wide, scaling, backend, weighting)[..., : query.shape[3]]
    pasts = [past.as_rectangle() for past in pasts if past.length]
    if not pasts and new is not None:
        return attend(query, *new, scaling, backend, None, weighting)
    several = query.shape[2] > 1 and weighting.plain
    if new is not None and several and takes_ragged(query, pasts, backend):
        return attend_ragged(query, pasts, new, scaling)
    if not (weighting.plain and _leaves_sums(query, backend)):
        return _attend_joined(query, pasts, new, scaling, backend, weighting)
    if are_few(query, pasts, new):
        return attend_few(query, pasts, new, scaling)
    states = [_over(query, past, scaling, backend) for past in pasts]
    if new is not None:
        states.append(_attention(query, *new, scaling, backend, causal=True))
    if len(states) == 1:
        return states[0][0].transpose(1, 2).contiguous()
    return merge_attention(*_merged(states[:-1]), *states[-1])


def _leaves_sums(query: Tensor, backend: Backend) -> bool:
    """Whether attention over some of the units says how much weight they have, so that it can be
    merged with that over others."""
    if backend == "cudnn":
        return query.shape[2] >= SPLIT_FROM
    return backend == "sdpa" and query.device.type in ("cpu", "cuda") and not multiplies_fast(query)


def _attend_joined(
    query: Tensor,
    pasts: Sequence[Past],
    new: tuple[Tensor, Tensor] | None,
    scaling: float,
    backend: Backend,
    weighting: Weighting,
) -> Tensor:
    """`attend_past` with all units of a sequence put side by side: the plain form."""
    every = [*pasts, *([] if new is None else [Past(*new)])]
    if all(past.sequences is None for past in every):
        keys = torch.cat([past.keys for past in every], dim=2)
        values = torch.cat([past.values for past in every], dim=2)
        return attend(query, keys, values, scaling, backend, None, weighting)
    some = next(past.sequences for past in every if past.sequences is not None)
    (rows, heads), outputs = some.shape, []
    group = query.shape[1] // heads
    for row in range(rows):
        for head in range(heads):
            of_head = slice(head * group, (head + 1) * group)
            each = zip(*(past.of(row, head) for past in every), strict=True)
            keys, values = (torch.cat(x, dim=2) for x in each)
            own = query[row : row + 1, of_head]
            its = weighting.of_heads(of_head)
            outputs.append(attend(own, keys, values, scaling, backend, None, its))
    joined = torch.stack(outputs).view(rows, heads, *outputs[0].shape[1:])
    return joined.transpose(1, 2).flatten(2, 3)


def _over(query: Tensor, past: Past, scaling: float, backend: Backend) -> tuple[Tensor, Tensor]:
    """Attention of every query to all of a past: output [B, H*G, T, D], log-sum-exp [B, H*G, T]
    (natural, float32)."""
    sequences = past.sequences
    if sequences is None:
        return _attention(query, past.keys, past.values, scaling, backend, causal=False)
    rows, heads = sequences.shape
    queries = query.unflatten(1, (heads, -1))
    states = [
        _over_sequence(queries[row : row + 1, head], past, row, head, scaling, backend)
        for row in range(rows)
        for head in range(heads)
    ]
    joined = (torch.cat(each).unflatten(0, (rows, heads)) for each in zip(*states, strict=True))
    output, sums = (x.flatten(1, 2) for x in joined)
    return output, sums


def _over_sequence(
    query: Tensor, past: Past, row: int, head: int, scaling: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """`_over` of one group's queries [1, G, T, D] and one sequence, which may be empty."""
    assert past.sequences is not None
    units = past.sequences.counts[row][head]
    if not units:
        sums = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
        return torch.zeros_like(query), sums
    # cuDNN makes a plan, which takes milliseconds, for every number that it meets.
    by = backend if is_on_grid(units) else "sdpa"
    return _attention(query, *past.of(row, head), scaling, by, causal=False)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, backend: Backend, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of [B, H*G, T, D] over [B, H, S, D], S = T if it is causal."""
    if backend == "cudnn":
        output, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scaling
        )
        return output, sums.reshape(query.shape[:3])
    batch, heads, tokens = query.shape[:3]
    if causal:
        group = heads // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    else:  # the tokens of a group's heads side by side, so that nothing is repeated
        query = query.reshape(batch, key.shape[1], -1, query.shape[3])
    if takes_flash(query):
        output, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scaling
        )
    elif query.is_cuda:
        output, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scaling
        )
        sums = sums[:, :, : query.shape[2]]
    else:
        output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scaling
        )
    return output.reshape(batch, heads, tokens, -1), sums.float().reshape(batch, heads, tokens)


def _merged(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over several sets of units together: output and log-sum-exp."""
    output, sums = states[0]
    for other, more in states[1:]:
        both = torch.logaddexp(sums, more)
        share, rest = ((x - both).exp().nan_to_num(0.0)[..., None] for x in (sums, more))
        output, sums = (output.float() * share + other.float() * rest).to(other.dtype), both
    return output, sums


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
