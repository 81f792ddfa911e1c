"""Each fused kernel: does it agree with its twin on this GPU, and how near is it to its floor.

    python -m benchmarks.kernels --out r.json

The floor is a torch copy that moves as many bytes, in the same run. Times are per call inside one
CUDA graph whose calls take turns on several sets of inputs, so that the L2 cache does not hold
them. A kernel that disagrees with its twin is named and the command ends with status 1.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.packed_inputs import after_packed, random_packed, random_rotated, uneven
from benchmarks.shapes import SHAPES
from locret.kernels import (
    PackedKV,
    RotatedKV,
    decode_attention,
    decode_packed,
    expand_rotated,
    expand_units,
    gather_units,
    packed_shares,
    rotate_at_slots,
    store_units,
    threshold_select,
)
from locret.kernels.decode import decode_attention_reference, store_units_reference
from locret.kernels.decode_packed import decode_packed_reference
from locret.kernels.evict import gather_units_reference, threshold_select_reference
from locret.kernels.packed import expand_units_reference
from locret.kernels.packed_rotated import expand_rotated_reference
from locret.kernels.rotate import rotate_at_slots_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
HEADS = ((3, 3, 64), (8, 4, 128), (32, 1, 96), (2, 7, 80), (4, 16, 256))  # H, G, D
SLOTS = (1, 63, 1025)


@dataclass
class Timed:
    """A kernel to be timed: one call for each set of inputs, the same with plain PyTorch, and the
    bytes that a call has to move."""

    kernel: Sequence[Callable[[], Any]]
    plain: Sequence[Callable[[], Any]]
    nbytes: int


def main() -> None:
    """Check, time, print a table and write the JSON."""
    given = _parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA device")
    torch.manual_seed(0)
    checks = {name: list(check()) for name, check in CHECKS.items()}
    failed = {name: bad for name, found in checks.items() if (bad := [f for f in found if f])}
    for name, found in checks.items():
        print(f"{name:<18} {'FAIL' if name in failed else 'ok'} in {len(found)} settings")
    for name, bad in failed.items():
        print(f"FAIL {name}: {len(bad)} settings disagree with the twin, first: {bad[0]}")
    times = _times(given)
    record.write(given.out, vars(given), {"failed": failed, "kernels": times})
    sys.exit(1 if failed else 0)


def _times(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    print(f"\n{'us a call':<18} {'kernel':>9} {'copy':>9} {'share':>7} {'plain':>9} {'host':>9}")
    times = {}
    for name, timed in _timed(given):
        kernel = _graph_seconds(timed.kernel, given.repeats)
        found = {
            "seconds": kernel,
            "copy_seconds": _copy_seconds(timed.nbytes, given.repeats),
            "plain_seconds": _graph_seconds(timed.plain, given.repeats),
            "host_seconds": _host_seconds(timed.kernel[0]),
            "bytes": timed.nbytes,
        }
        found["share_of_copy"] = found["copy_seconds"] / kernel
        times[name] = found
        print(
            f"{name:<18} {1e6 * kernel:9.2f} {1e6 * found['copy_seconds']:9.2f} "
            f"{found['share_of_copy']:7.2f} {1e6 * found['plain_seconds']:9.2f} "
            f"{1e6 * found['host_seconds']:9.2f}"
        )
    return times


# Agreement with the twins. Each yields "" for a setting that agrees and what differs otherwise.


def _compare(setting: Any, actual: Tensor, expected: Tensor) -> str:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{setting}: {actual.dtype}{tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not actual.is_floating_point():
        return "" if torch.equal(actual, expected) else f"{setting}: other values"
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    # A NaN is not near anything.
    return "" if error <= TOLERANCE[actual.dtype] else f"{setting}: relative error {error:.2e}"


def _some(*axes: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Settings in which every value of every axis occurs, not all of them with all others: each
    setting is compiled."""
    return itertools.islice(itertools.product(*axes), 0, None, 7)


def _check_rotate() -> Iterator[str]:
    for (heads, _, size), slots, dtype, part, pairing in _some(
        HEADS, SLOTS, DTYPES, (1, 4), ("half", "interleaved")
    ):
        x = _random(2, heads, slots + 5, size, dtype=dtype)[:, :, 5:]
        cos, sin = _random(2, 1 + part // 4, slots, size // part // 2 * 2, dtype=dtype).unbind()
        yield _compare(
            (heads, slots, size, dtype, part, pairing),
            rotate_at_slots(x, cos, sin, pairing),
            rotate_at_slots_reference(x, cos, sin, pairing),
        )


def _check_gather() -> Iterator[str]:
    for (heads, _, size), (held, new, keep), dtype in _some(
        HEADS, ((1025, 63, 800), (0, 7, 3), (129, 0, 64), (40000, 1024, 40000)), DTYPES
    ):
        old, fresh = (
            (_random(1, heads, n, size, dtype=dtype), _random(1, heads, n)) for n in (held, new)
        )
        index = _random(1, heads, held + new).topk(keep).indices.sort().values
        kept = gather_units(old, fresh, index, room=3)
        for actual, expected in zip(kept, gather_units_reference(old, fresh, index), strict=True):
            same = torch.equal(actual[:, :, :keep], expected)
            yield "" if same else f"{(heads, size, held, new, keep, dtype)}: other values"


def _check_decode() -> Iterator[str]:
    for (heads, group, size), (capacity, length), new, dtype in _some(
        HEADS, ((64, 1), (200, 63), (5000, 4097)), (1, 3), DTYPES
    ):
        if length < new:
            continue
        keys, values = _random(2, 2, heads, capacity, size, dtype=dtype).unbind()
        keys[:, :, length:] = torch.nan
        values[:, :, length:] = torch.nan
        query = _random(2, heads * group, new, size, dtype=dtype)
        filled = torch.tensor([length], dtype=torch.int32, device="cuda")
        first = torch.randint(0, length, (2, heads), device="cuda", dtype=torch.int32)
        for start in (None, first):
            arguments = (query, keys, values, filled, size**-0.5, start)
            yield _compare(
                (heads, group, size, capacity, length, new, dtype, start is not None),
                decode_attention(*arguments),
                decode_attention_reference(*arguments),
            )


def _check_packed() -> Iterator[str]:
    for (heads, group, size), (count, bits), channels, new, dtype in _some(
        HEADS, ((63, 8), (63, 4), (5000, 4), (5000, 2)), (32, 64), (1, 3), DTYPES
    ):
        lengths = uneven(heads, count)
        packed = random_packed(lengths, size, bits, channels)
        setting = (heads, group, size, count, bits, channels, new, dtype)
        yield from _check_decoded(setting, packed, lengths, group, new, size, dtype)


def _check_rotated() -> Iterator[str]:
    for (heads, group, size), (count, bits), value_bits, new, dtype in _some(
        HEADS, ((63, 8), (63, 4), (5000, 4), (5000, 3), (5000, 2)), (2, 3), (1, 3), DTYPES
    ):
        lengths = uneven(heads, count)
        packed = random_rotated(lengths, size, bits, value_bits)
        setting = (heads, group, size, count, bits, value_bits, new, dtype)
        yield from _check_decoded(setting, packed, lengths, group, new, size, dtype)


def _check_decoded(
    setting: Any,
    packed: PackedKV | RotatedKV,
    lengths: Sequence[int],
    group: int,
    new: int,
    size: int,
    dtype: torch.dtype,
) -> Iterator[str]:
    heads = len(lengths)
    query = _random(1, heads * group, new, size, dtype=dtype)
    shares = packed_shares(packed, lengths, group * new, dtype)
    arguments: tuple[Any, ...] = (query, packed, shares)
    arguments += after_packed(heads, 16, (300, 200), size, dtype)
    yield _compare(setting, decode_packed(*arguments), decode_packed_reference(*arguments))


def _check_expand() -> Iterator[str]:
    for (heads, _, size), (count, bits), channels, dtype in _some(
        HEADS, ((63, 8), (63, 4), (5000, 4), (5000, 2)), (32, 64), DTYPES
    ):
        packed = random_packed(uneven(heads, count), size, bits, channels)
        at = torch.randperm(packed.count + 9, device="cuda")[: packed.count]
        for units, starts in ((packed.keys, packed.starts), (packed.values, None)):
            out = torch.full((packed.count + 9, size), torch.nan, dtype=dtype, device="cuda")
            expand_units(units, bits, channels, out, starts, at)
            expected = expand_units_reference(units, bits, channels, size, starts).to(dtype)
            same = torch.equal(out[at], expected)
            yield "" if same else f"{(heads, size, count, bits, channels, dtype)}: differs"


def _check_expand_rotated() -> Iterator[str]:
    for (heads, _, size), bits, dtype in _some(HEADS, (2, 3, 4, 8), DTYPES):
        packed = random_rotated(uneven(heads, 500), size, bits, bits)
        for units, starts in ((packed.keys, packed.starts), (packed.values, None)):
            out = torch.full((packed.count, size), torch.nan, dtype=dtype, device="cuda")
            expand_rotated(units, packed.key_levels, out, starts)
            expected = expand_rotated_reference(units, packed.key_levels, size, starts)
            yield _compare((heads, size, bits, dtype), out, expected.to(dtype))


def _check_store() -> Iterator[str]:
    for (heads, _, size), dtype, slot in _some(HEADS, DTYPES, (0, 17, 62)):
        storage = _random(2, 2, heads, 63, size, dtype=dtype)
        new = _random(2, 2, heads, 1, size, dtype=dtype)
        expected = storage.clone()
        at = torch.tensor([slot], device="cuda")
        store_units(*storage, *new, at)
        store_units_reference(*expected, *new, at)
        yield "" if torch.equal(storage, expected) else f"{(heads, size, dtype, slot)}: differs"


def _check_select() -> Iterator[str]:
    for size, share, kind in itertools.product(
        (2, 63, 1025, 20480, 32768, 69632), (0.1, 0.8), ("distinct", "ties", "strange")
    ):
        scores = _random(2, 3, size)
        if kind == "ties":
            scores = scores.round(decimals=1)
        if kind == "strange":
            strange = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0], device="cuda")
            scores[:, :, ::3] = strange[torch.randint(0, 5, scores[:, :, ::3].shape, device="cuda")]
        budget = max(1, int(size * share))
        for arguments in ((budget,), (budget, budget // 2, budget // 3)):
            yield _compare(
                (size, kind, arguments),
                threshold_select(scores, *arguments),
                threshold_select_reference(scores, *arguments),
            )
        if kind == "distinct":
            topk = scores.topk(budget).indices.sort().values
            yield _compare((size, "topk", budget), threshold_select(scores, budget), topk)


CHECKS: dict[str, Callable[[], Iterator[str]]] = {
    "rotate_at_slots": _check_rotate,
    "gather_units": _check_gather,
    "decode_attention": _check_decode,
    "decode_packed": _check_packed,
    "decode_packed, rotated": _check_rotated,
    "expand_units": _check_expand,
    "expand_rotated": _check_expand_rotated,
    "store_units": _check_store,
    "threshold_select": _check_select,
}


# What is timed, at the shape of one layer.


def _timed(given: argparse.Namespace) -> Iterator[tuple[str, Timed]]:
    shape = SHAPES[given.shape]
    heads = shape["num_key_value_heads"]
    queries = shape["num_attention_heads"]
    size = shape.get("head_dim", shape["hidden_size"] // queries)
    held, chunk, sets = given.budget, given.chunk, range(given.sets)
    slots = held + chunk

    cos, sin = _random(2, 1, slots, size, dtype=torch.bfloat16).unbind()
    keys = [_random(1, heads, slots, size, dtype=torch.bfloat16) for _ in sets]
    values = [_random(1, heads, slots, size, dtype=torch.bfloat16) for _ in sets]
    scores = [_random(1, heads, slots) for _ in sets]
    positions = [torch.arange(slots, device="cuda").expand(1, heads, slots) for _ in sets]

    turned = [torch.empty_like(keys[0]) for _ in sets]
    yield (
        "rotate_at_slots",
        Timed(
            [_call(rotate_at_slots, keys[i], cos, sin, "half", turned[i]) for i in sets],
            [_call(rotate_at_slots_reference, keys[i], cos, sin, "half") for i in sets],
            2 * keys[0].nbytes + cos.nbytes + sin.nbytes,
        ),
    )

    units = [(keys[i], values[i], scores[i], positions[i]) for i in sets]
    old = [tuple(u[:, :, :held] for u in units[i]) for i in sets]
    new = [tuple(u[:, :, held:] for u in units[i]) for i in sets]
    index = [threshold_select(scores[i], held) for i in sets]
    yield (
        "gather_units",
        Timed(
            [_call(gather_units, old[i], new[i], index[i]) for i in sets],
            [_call(gather_units_reference, old[i], new[i], index[i]) for i in sets],
            2 * heads * held * (2 * 2 * size + 4 + 8) + index[0].nbytes,
        ),
    )

    query = _random(1, queries, 1, size, dtype=torch.bfloat16)
    length = torch.tensor([held], dtype=torch.int32, device="cuda")
    scaling = size**-0.5
    yield (
        "decode_attention",
        Timed(
            [_call(decode_attention, query, keys[i], values[i], length, scaling) for i in sets],
            [
                _call(_sdpa, query, keys[i][:, :, :held], values[i][:, :, :held], scaling)
                for i in sets
            ],
            2 * heads * held * size * 2,
        ),
    )

    lengths = [given.packed] * heads
    codes: dict[str, list[Any]] = {
        "": [random_packed(lengths, size, 4, 64) for _ in sets],
        ", rotated": [random_rotated(lengths, size, 3, 3) for _ in sets],
    }
    for name, packed in codes.items():
        shares = packed_shares(packed[0], lengths, queries // heads, query.dtype)
        rest = [after_packed(heads, 16, (512, 256), size, query.dtype) for _ in sets]
        every = [(query, packed[i], shares, *rest[i]) for i in sets]
        tensors = (*packed[0].keys, packed[0].starts, *packed[0].values)
        yield (
            f"decode_packed{name}",
            Timed(
                [_call(decode_packed, *arguments) for arguments in every],
                [_call(decode_packed_reference, *arguments) for arguments in every],
                sum(x.nbytes for x in tensors) + 4 * heads * (16 + 256) * size,
            ),
        )

    whole = torch.empty(heads * given.packed, size, dtype=torch.bfloat16, device="cuda")
    for what in ("keys", "values"):
        sides = [
            (getattr(each, what), 4, 64, whole, each.starts if what == "keys" else None)
            for each in codes[""]
        ]
        yield (
            f"expand_units, {what}",
            Timed(
                [_call(expand_units, *side) for side in sides],
                [_call(expand_units_reference, *side[:3], size, side[4]) for side in sides],
                sum(tensor.nbytes for tensor in sides[0][0]) + whole.nbytes,
            ),
        )
    levels = codes[", rotated"][0].key_levels
    keys_of = [(each.keys, levels, each.starts) for each in codes[", rotated"]]
    yield (
        "expand_rotated, keys",
        Timed(
            [_call(expand_rotated, keys, levels, whole, starts) for keys, _, starts in keys_of],
            [
                _call(expand_rotated_reference, keys, levels, size, starts)
                for keys, _, starts in keys_of
            ],
            sum(tensor.nbytes for tensor in keys_of[0][0]) + whole.nbytes,
        ),
    )

    key = query[:, :heads]
    yield (
        "store_units",
        Timed(
            [_call(store_units, keys[i], values[i], key, key, length) for i in sets],
            [_call(store_units_reference, keys[i], values[i], key, key, length) for i in sets],
            4 * key.nbytes,
        ),
    )

    yield (
        "threshold_select",
        Timed(
            [_call(threshold_select, scores[i], held) for i in sets],
            [_call(_topk, scores[i], held) for i in sets],
            scores[0].nbytes + index[0].nbytes,
        ),
    )


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, scale=scaling, enable_gqa=True
    )


def _topk(scores: Tensor, budget: int) -> Tensor:
    return scores.topk(budget, sorted=False).indices.sort().values


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def _copy_seconds(nbytes: int, repeats: int) -> float:
    """Of a copy that reads half of so many bytes and writes the other half."""
    sets = max(2, min(64, 2**28 // nbytes))
    pairs = torch.ones(sets, 2, max(1, nbytes // 4), dtype=torch.int16, device="cuda")
    return _graph_seconds([_call(pair[0].copy_, pair[1]) for pair in pairs], repeats)


def _graph_seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    """Median seconds of one call on the device, when the calls follow each other in a graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = max(1, 24 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return record.seconds(graph.replay, repeats, torch.device("cuda")) / (rounds * len(calls))


def _host_seconds(call: Callable[[], Any], calls: int = 50) -> float:
    """Seconds the host takes to launch one call."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - started
    torch.cuda.synchronize()
    return elapsed / calls


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--budget", type=int, default=16384, help="units held in each head")
    parser.add_argument("--chunk", type=int, default=4096, help="new units of a chunk")
    parser.add_argument("--packed", type=int, default=65536, help="units held at 4 bits")
    parser.add_argument("--sets", type=int, default=4, help="sets of inputs that take turns")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="where to write the JSON")
    return parser


if __name__ == "__main__":
    main()
