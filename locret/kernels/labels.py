"""What an answer makes of a prompt's units: of each unit, the largest attention probability or the
largest logit over the answer's tokens. For labels (`locret.heads.targets`, which has the twins).

Two launches. The first leaves the log-sum-exp of each answer query, by an online softmax over tiles
of units; it is left out where attention has computed them. In the second a program holds a tile of
the prompt's keys, and all queries of a head go past it: since exp2 grows with its argument, the
largest probability is exp2 of the largest difference between logit and log-sum-exp, so that no
exponential is taken there but at the end.
Logits are never in memory. They are in units of log2, so that exp2 serves.

A answer tokens, P prompt tokens, S = P + A.
"""

import math

import torch
from torch import Tensor

from locret.kernels.dispatch import (
    INTERPRETED,
    check_tensors,
    head_of,
    on_device,
    padded,
    takes_triton,
    tl,
    triton,
    units_at,
)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST = 256  # head size, of which a tile of queries and some of keys fit shared memory
_LOG2E = math.log2(math.e)


def why_not(query: Tensor, key: Tensor, scaling: float) -> str | None:
    """Why these kernels do not take queries [B, H*G, A, D], keys [B, H, S, D] and a softmax scale;
    None if they do."""
    if not takes_triton(query, key):
        return f"kernels run on a GPU that Triton knows, not on {query.device}"
    if query.dtype != key.dtype or query.dtype not in _DTYPES:
        return f"queries are {query.dtype} and keys {key.dtype}; expected both of {_DTYPES}"
    if key.shape[3] > _LARGEST:
        return f"heads are of size {key.shape[3]}; expected at most {_LARGEST}"
    if query.stride(3) != 1 or key.stride(3) != 1:
        return "channels of queries or keys are not contiguous"
    return None if scaling > 0 else f"the softmax scale is {scaling}; expected a positive one"


def highest_shares(
    query: Tensor,
    key: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    of_asking: Tensor | None = None,
    log_sums: Tensor | None = None,
) -> Tensor:
    """The largest attention probability of each prompt unit over the answer's tokens.

    Args:
        query: [B, H*G, A, D], the answer's; channels contiguous.
        key: [B, H, S, D], of prompt and answer, in query's dtype; channels contiguous. An answer
            token sees the prompt, the answer's tokens before it and itself.
        scaling: of the logits.
        softcap: the logits' bound, None = none.
        sinks: [H*G], a logit more of every softmax; None = none.
        of_asking: [B, A], positive factors of the answer tokens' probabilities; None = ones.
        log_sums: float32 [B, H*G, A], the log-sum-exp of each query's logits as the softmax gets
            them, natural; None = computed here.

    Returns:
        float32 [B, H, G, P], a query head each. Not a number where a query or a key is not.

    Raises:
        ValueError: shapes do not fit, or `why_not` says why these tensors are not taken.
    """
    _check(query, key, scaling, sinks, of_asking, log_sums)
    if log_sums is None:
        sums = _log_sums(query, key, scaling, softcap, sinks)
    else:
        sums = torch.mul(log_sums, _LOG2E).contiguous()
    if of_asking is not None:
        sums -= of_asking.float().log2()[:, None]
    return _highest(query, key, scaling, softcap, sums)


def highest_logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The largest scaled logit of each prompt unit over the answer's tokens: float32 [B, H, G, P].

    Arguments and errors are those of `highest_shares`.
    """
    _check(query, key, scaling)
    return _highest(query, key, scaling, None, None)


def _check(
    query: Tensor,
    key: Tensor,
    scaling: float,
    sinks: Tensor | None = None,
    of_asking: Tensor | None = None,
    log_sums: Tensor | None = None,
) -> None:
    (batch, heads, answer, size), (_, kv_heads, units, _) = query.shape, key.shape
    if key.shape[0] != batch or key.shape[3] != size or heads % kv_heads or not 0 < answer <= units:
        raise ValueError(
            f"queries {tuple(query.shape)} do not fit keys {tuple(key.shape)}: expected "
            "[B, H*G, A, D] and [B, H, S, D] with 1 <= A <= S"
        )
    if sinks is not None:
        check_tensors({"sinks": (sinks, sinks.dtype, (heads,))})
    if of_asking is not None:
        check_tensors({"of_asking": (of_asking, of_asking.dtype, (batch, answer))}, False)
    if log_sums is not None:
        check_tensors({"log_sums": (log_sums, torch.float32, (batch, heads, answer))}, False)
    reason = why_not(query, key, scaling)
    if reason is not None:
        raise ValueError(f"the labels' kernels do not take this: {reason}")


def _tiles(query: Tensor, resident_queries: bool) -> dict[str, int]:
    """Queries and units of a tile, and the warps, stages and registers that multiply it.

    One of the two stays with its program, the other is read tile after tile. In 16 bits and heads
    of up to 128 channels two programs share a multiprocessor, so that one multiplies while the
    other takes exponentials: each has half of the shared memory and of the registers.
    """
    size = padded(query.shape[3], least=16)
    stays, passes, warps, stages, registers = 128, 64, 8, 3, 255
    if query.dtype == torch.float32:
        stays, passes, stages = 64, 32, 2
    elif size <= 128:
        passes, stages, registers = 128, 2, 128
    queries, units = (stays, passes) if resident_queries else (passes, stays)
    return {
        "QUERIES": queries,
        "UNITS": units,
        "SIZE": query.shape[3],
        "SIZE_BLOCK": size,
        "UPCAST": INTERPRETED,  # which multiplies bfloat16 blocks as integers
        "num_warps": warps,
        "num_stages": stages,
        **({} if torch.version.hip else {"maxnreg": registers}),
    }


def _bend(scaling: float, softcap: float | None) -> tuple[float, float]:
    """What products are multiplied by: in front of the cap, and after it, in units of log2."""
    return (1.0, scaling * _LOG2E) if softcap is None else (scaling / softcap, softcap * _LOG2E)


def _log_sums(
    query: Tensor, key: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """log2 of the sum of each answer query's exponentials: float32 [B, H*G, A]."""
    batch, heads, answer, _ = query.shape
    sums = torch.empty(batch, heads, answer, dtype=torch.float32, device=query.device)
    tiles = _tiles(query, resident_queries=True)
    with on_device(query):
        _sum_up[(triton.cdiv(answer, tiles["QUERIES"]) * batch * heads,)](
            *(query, key, sinks, sums, *_bend(scaling, softcap), answer, key.shape[2], heads),
            *(query.stride(), key.stride()),
            GROUP=heads // key.shape[1],
            CAPPED=softcap is not None,
            **tiles,
        )
    return sums


def _highest(
    query: Tensor, key: Tensor, scaling: float, softcap: float | None, sums: Tensor | None
) -> Tensor:
    """What the second launch makes of log-sum-exps; without them, the largest logits."""
    batch, heads, answer, _ = query.shape
    prompt = key.shape[2] - answer
    out = torch.empty(batch, heads, prompt, dtype=torch.float32, device=query.device)
    tiles = _tiles(query, resident_queries=False)
    bend, scale = _bend(scaling, softcap) if sums is not None else (1.0, scaling)
    if out.numel():
        with on_device(query):
            _find_highest[(triton.cdiv(prompt, tiles["UNITS"]) * batch * heads,)](
                *(query, key, sums, out, bend, scale, answer, prompt, heads),
                *(query.stride(), key.stride()),
                GROUP=heads // key.shape[1],
                CAPPED=softcap is not None,
                **tiles,
            )
    return out.unflatten(1, (key.shape[1], -1))


@triton.jit
def _products(left, right, bend, CAPPED: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """left @ right, float32; bent to -1 .. 1 where logits are capped."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    made = tl.dot(left, right, input_precision="ieee")
    if CAPPED:
        # tanh, by an exponential that may be infinite
        made = 1.0 - 2.0 / (1.0 + tl.exp2(made * (bend * 2.8853900817779268)))
    return made


@triton.jit(do_not_specialize=["answer", "units", "heads"])
def _sum_up(  # type: ignore[no-untyped-def]
    query, key, sinks, sums, bend, scale, answer, units, heads, query_strides, key_strides,
    GROUP: tl.constexpr, CAPPED: tl.constexpr, QUERIES: tl.constexpr, UNITS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(answer, QUERIES)
    sequence, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * QUERIES
    b, h = head_of(sequence, heads)
    row, unit, d = first + tl.arange(0, QUERIES), tl.arange(0, UNITS), tl.arange(0, SIZE_BLOCK)
    q_at = units_at(query, query_strides, b, h, row.to(tl.int64))[:, None] + d[None, :]
    q = tl.load(q_at, mask=(row < answer)[:, None] & (d < SIZE)[None, :], other=0.0)
    k_s = key_strides[2].to(tl.int64)
    k_at = units_at(key, key_strides, b, h // GROUP, 0) + d[:, None] + unit[None, :] * k_s

    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, sink)
        total += 1.0
    prompt = units - answer
    seen_by_all = prompt + first + 1
    for at in tl.range(0, tl.minimum(prompt + first + QUERIES, units), UNITS):
        k = tl.load(k_at, mask=(at + unit < units)[None, :] & (d < SIZE)[:, None], other=0.0)
        logits = _products(q, k, bend, CAPPED, UPCAST)
        if at + UNITS > seen_by_all:
            visible = (at + unit)[None, :] <= (prompt + row)[:, None]
            logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - higher[:, None])
        total = total * tl.exp2(highest - higher) + tl.sum(weights, 1)
        highest = higher
        k_at += UNITS * k_s
    to = sums + sequence.to(tl.int64) * answer + row
    tl.store(to, highest + tl.log2(total), mask=row < answer)


@triton.jit(do_not_specialize=["answer", "prompt", "heads"])
def _find_highest(  # type: ignore[no-untyped-def]
    query, key, sums, out, bend, scale, answer, prompt, heads, query_strides, key_strides,
    GROUP: tl.constexpr, CAPPED: tl.constexpr, QUERIES: tl.constexpr, UNITS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(prompt, UNITS)
    sequence, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * UNITS
    b, h = head_of(sequence, heads)
    row, unit, d = tl.arange(0, QUERIES), first + tl.arange(0, UNITS), tl.arange(0, SIZE_BLOCK)
    k_at = units_at(key, key_strides, b, h // GROUP, unit.to(tl.int64))[:, None] + d[None, :]
    k = tl.load(k_at, mask=(unit < prompt)[:, None] & (d < SIZE)[None, :], other=0.0)
    q_s = query_strides[2].to(tl.int64)
    q_at = units_at(query, query_strides, b, h, 0) + d[:, None] + row[None, :] * q_s
    if sums is not None:
        sums += sequence.to(tl.int64) * answer

    # The largest of numbers says nothing of those that are not numbers: they are looked for apart.
    highest = tl.full((UNITS,), float("-inf"), tl.float32)
    lost = tl.zeros((QUERIES,), tl.int32)
    added = tl.zeros((UNITS,), tl.float32)
    for at in tl.range(0, answer, QUERIES):
        here = at + row < answer
        q = tl.load(q_at, mask=here[None, :] & (d < SIZE)[:, None], other=0.0)
        logits = _products(k, q, bend, CAPPED, UPCAST)
        if sums is not None:
            below = tl.load(sums + at + row, mask=here, other=float("inf"))
            lost = tl.maximum(lost, (below != below).to(tl.int32))
        else:
            below = tl.where(here, 0.0, float("inf"))
            added += tl.sum(logits, 1)
        highest = tl.maximum(highest, tl.max(logits * scale - below[None, :], 1))
        q_at += QUERIES * q_s
    if sums is not None:
        highest = tl.where(tl.max(lost, 0) > 0, float("nan"), tl.exp2(highest))
    else:
        highest = tl.where(added != added, float("nan"), highest)
    tl.store(out + sequence.to(tl.int64) * prompt + unit, highest, mask=unit < prompt)
