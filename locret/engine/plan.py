"""What fits into a given memory, from a model's config alone: no weight is loaded.

    python -m locret plan --model meta-llama/Llama-3.1-8B-Instruct --memory 24GiB --context 128K

Counted are the weights, the retaining heads, the cache with its source positions, what
one chunk needs while a layer computes, and a reserve for everything else. Weights and cache are
exact (thin blocks of quantized keys as far as they may go, outliers not counted); the chunk is an
estimate of the largest tensors that live at once, with attention that
materialises no T x S matrix: on Llama-3.1-8B's shapes (one H200, budgets 16K and 48K) prefill took
at most what is said here and 95 % of it at least. B is 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from locret.cache.sizing import Sizing
from locret.engine.chunk_size import chosen_chunk, chunk_bytes, working_slot
from locret.engine.config import PAPER, Auto, EngineConfig
from locret.heads.heads import Geometry
from locret.heads.quotas import Quotas, in_words
from locret.model.backbone import Backbone
from locret.quantities import MOST, format_bytes
from locret.quantization import NO_SCHEME, SCHEMES, Scheme
from locret.quantization.blocks import costs_of

PLANNED: tuple[Scheme, ...] = tuple(
    scheme(bits=bits)
    for scheme in SCHEMES.values()
    if scheme.outliers is None and scheme.for_layer is Scheme.for_layer
    for bits in sorted(scheme.widths, reverse=True)
)
"""The ways to store keys and values that are told of, with their default options: those whose bytes
follow from the model's shape alone and are the same in every layer."""

RESERVE = 0.05  # of the memory: the device's own context, fragmentation, logits

HEAD_WIDTH = 1024  # the paper's

DEFAULT_NEW_TOKENS = 1024


@dataclass(frozen=True)
class SchemePlan:
    """What fits with one way to store keys and values.

    Attributes:
        name, bits: of the scheme; "none" stores elements as they are.
        bytes_per_token: of keys and values with their scales, all layers and KV heads, in full
            blocks.
        context_bytes: the cache if nothing of the context is evicted, bookkeeping included.
        budget: units a KV head can keep on average, at most the context; 0 = nothing fits.
        compression: tokens of the context for every unit of the budget; None if nothing fits.
        units: what all KV heads keep together.
    """

    name: str
    bits: int
    bytes_per_token: float
    context_bytes: int
    budget: int
    compression: float | None
    units: int


@dataclass(frozen=True)
class Plan:
    """Where the memory goes. All sizes in bytes; `left_bytes` is for the cache (below 0: too big).

    Attributes:
        memory, context, new_tokens, dtype: as asked for.
        chunk_size: tokens read at a time.
        packed_chunk_size: the same where units are packed.
        window: the model's `max_position_embeddings`.
        geometry: of the attention layers.
        parameters, weights_bytes: of the backbone, tied ones once.
        heads_bytes: of retaining heads, 0 without.
        sliding_layers, sliding_bytes: layers with a window, which hold it whatever the budget is.
        chunk_bytes: what reading one chunk needs beside the cache.
        packed_chunk_bytes: the same where units are packed; `left_bytes` is without the difference.
        reserve_bytes: see `RESERVE`.
        schemes: one for each of `PLANNED`.
        spread: how unequal heads are at the largest budget that is short of the context, in words;
            None = equal quotas.
    """

    memory: int
    context: int
    chunk_size: int
    packed_chunk_size: int
    new_tokens: int
    dtype: str
    window: int
    geometry: Geometry
    parameters: int
    weights_bytes: int
    heads_bytes: int
    sliding_layers: int
    sliding_bytes: int
    chunk_bytes: int
    packed_chunk_bytes: int
    reserve_bytes: int
    left_bytes: int
    schemes: tuple[SchemePlan, ...]
    spread: str | None = None


def make_plan(
    config: Any,
    *,
    memory: int,
    context: int,
    dtype: torch.dtype | None = None,
    chunk_size: int | None | Auto = "auto",
    new_tokens: int = DEFAULT_NEW_TOKENS,
    head_width: int = HEAD_WIDTH,
    quotas: Quotas | None = None,
) -> Plan:
    """Say what fits.

    Args:
        config: of a transformers causal language model.
        memory: bytes that the process may use on the device.
        context: tokens to be read.
        dtype: of weights and unquantized cache; default the config's, else bfloat16.
        chunk_size: tokens read at a time; None = all at once; "auto" = as an engine would on a GPU
            of that memory (`locret.engine.chunk_size`).
        new_tokens: answer tokens to leave room for, beside the paper's local tokens.
        head_width: hidden width of the retaining heads, with tap `qkv`; 0 = no heads.
        quotas: of the heads. What they keep together does not depend on them; what the layer at
            work takes beside the cache does.

    Raises:
        ValueError: the architecture is not supported, a number is out of range, or quotas are of
            another shape.
    """
    for name, value, least in (
        ("memory", memory, 1),
        ("context", context, 1),
        ("new_tokens", new_tokens, 0),
        ("head_width", head_width, 0),
    ):
        if not least <= value <= MOST:
            raise ValueError(f"{name} is {value}; expected at least {least}, and at most {MOST}")
    asked = EngineConfig.of(chunk_size=chunk_size).reading.chunk_size
    dtype = dtype or getattr(config, "dtype", None) or torch.bfloat16
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    backbone = Backbone(model)
    geometry = backbone.geometry
    if quotas is not None:
        quotas.check_shape(geometry.num_layers, geometry.num_kv_heads)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    a_head = head_width * (geometry.feature_width("qkv") + geometry.num_kv_heads)
    heads = geometry.num_layers * a_head * dtype.itemsize
    token_bytes = chunk_bytes(geometry, config, dtype, head_width)

    def chunk_of(packs: bool) -> tuple[int, int]:
        tokens = asked or context
        if tokens == "auto":
            room = config.max_position_embeddings // 2
            tokens = chosen_chunk("cuda", packs, room, memory - weights - heads, token_bytes)
        return tokens, min(tokens, context) * token_bytes

    (tokens, chunk), (packed_tokens, packed_chunk) = chunk_of(False), chunk_of(True)
    reserve = round(memory * RESERVE)
    after = PAPER["local_tokens"] + new_tokens
    sizing = Sizing.of(NO_SCHEME, geometry, dtype.itemsize, windows=backbone.windows)
    sliding = sizing.window_bytes(context + after)
    left = memory - weights - heads - sliding - chunk - reserve
    slot = round(working_slot(geometry, dtype) * _largest_layer(quotas))
    lefts = {False: left, True: left + chunk - packed_chunk}
    schemes = tuple(
        _scheme(scheme, geometry, dtype, lefts[scheme.packs], context, after, slot)
        for scheme in PLANNED
    )
    return Plan(
        memory=memory,
        context=context,
        chunk_size=tokens,
        packed_chunk_size=packed_tokens,
        new_tokens=new_tokens,
        dtype=str(dtype).removeprefix("torch."),
        window=config.max_position_embeddings,
        geometry=geometry,
        parameters=model.num_parameters(),
        weights_bytes=weights,
        heads_bytes=heads,
        sliding_layers=len(sizing.windows),
        sliding_bytes=sliding,
        chunk_bytes=chunk,
        packed_chunk_bytes=packed_chunk,
        reserve_bytes=reserve,
        left_bytes=left,
        schemes=schemes,
        spread=_spread(quotas, schemes),
    )


def _scheme(
    scheme: Scheme,
    geometry: Geometry,
    dtype: torch.dtype,
    left: int,
    context: int,
    after: int,
    slot_bytes: int,
) -> SchemePlan:
    sizing = Sizing.of(scheme, geometry, dtype.itemsize)
    # A slot costs its units in all layers, and its share of the one layer that is at work.
    units = sizing.units_within(left, context + after, slot_bytes=slot_bytes)
    budget = max(0, min(context, units - after))
    heads = geometry.num_layers * geometry.num_kv_heads
    return SchemePlan(
        name=scheme.name,
        bits=scheme.bits if scheme.packs else 8 * dtype.itemsize,
        bytes_per_token=heads * costs_of(scheme, geometry.head_size, dtype.itemsize).packed,
        context_bytes=sizing.cache_bytes([context] * geometry.num_layers, context),
        budget=budget,
        compression=context / budget if budget else None,
        units=heads * budget,
    )


def _largest_layer(quotas: Quotas | None) -> float:
    """What the layer that keeps most holds, next to the mean layer, at any compression."""
    tables = () if quotas is None else quotas.tables
    return max((sum(layer) / len(layer) for _, table in tables for layer in table), default=1.0)


def _spread(quotas: Quotas | None, schemes: tuple[SchemePlan, ...]) -> str | None:
    compressions = [s.compression for s in schemes if s.compression and s.compression > 1]
    if quotas is None or not compressions:
        return None
    return in_words(quotas.at(min(compressions)))


def as_text(plan: Plan, name: str) -> str:
    """The plan for people."""
    shape = plan.geometry
    lines = [
        f"{name}: {plan.parameters / 1e9:.2f}B parameters, "
        f"{shape.num_layers + plan.sliding_layers} layers, "
        f"{shape.num_kv_heads} KV heads of {shape.head_size}, {plan.dtype}",
        f"{format_bytes(plan.memory)} of memory, a context of {plan.context:,} tokens\n",
    ]
    windows = [("windows", plan.sliding_bytes, f"of {plan.sliding_layers} sliding layers")]
    for part, size, note in (
        ("weights", plan.weights_bytes, ""),
        ("heads", plan.heads_bytes, ""),
        *(windows if plan.sliding_layers else []),
        ("chunk", plan.chunk_bytes, _chunk_note(plan)),
        ("reserve", plan.reserve_bytes, f"{RESERVE:.0%} for all else"),
        ("left", plan.left_bytes, "for the cache"),
    ):
        lines.append(f"{part:<10}{format_bytes(size):>12}  {note}".rstrip())
    lines.append(
        f"\n{'cache':<14}{'bytes/token':>12}{'whole context':>15}{'budget':>10}{'ratio':>8}"
        f"{'all units':>14}"
    )
    lines += [_scheme_line(scheme, plan) for scheme in plan.schemes]
    lines += [f"\n{note}" for note in _notes(plan)]
    return "\n".join(lines)


def _chunk_note(plan: Plan) -> str:
    note = f"{plan.chunk_size:,} tokens read at a time; an estimate"
    if plan.packed_chunk_bytes == plan.chunk_bytes:  # of a short context, too
        return note
    more = format_bytes(plan.packed_chunk_bytes - plan.chunk_bytes)
    return f"{note}; {plan.packed_chunk_size:,} where units are packed, {more} more"


def _scheme_line(scheme: SchemePlan, plan: Plan) -> str:
    whole = scheme.budget == plan.context
    return (
        f"{f'{scheme.name} {scheme.bits} bit':<14}{scheme.bytes_per_token:>12,.0f}"
        f"{format_bytes(scheme.context_bytes):>15}"
        f"{'all' if whole else f'{scheme.budget:,}' if scheme.budget else '-':>10}"
        f"{f'{scheme.compression:.1f}x' if scheme.compression else '-':>8}"
        f"{f'{scheme.units:,}' if scheme.units else '-':>14}"
    )


def _notes(plan: Plan) -> list[str]:
    notes = []
    best = max(scheme.budget for scheme in plan.schemes)
    if not best:
        notes.append("Nothing fits: more memory, a smaller model or a smaller chunk is needed.")
    if plan.spread:
        notes.append(
            f"A budget is what heads keep on average; one keeps {plan.spread} of all units."
        )
    if min(best + plan.packed_chunk_size, plan.context) > plan.window:
        notes.append(
            f"The model's window is {plan.window:,} positions: budget and chunk together must stay "
            "within it, and budget, local tokens and answer."
        )
    return notes
