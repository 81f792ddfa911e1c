"""Each fused kernel: does it agree with its twin on this GPU, and how near is it to its floor.

    python -m benchmarks.kernels --out r.json

The floor is a torch copy that moves as many bytes, in the same run. Times are per call inside one
CUDA graph whose calls take turns on several sets of inputs, so that the L2 cache does not hold
them. A kernel that disagrees with its twin is named and the command ends with status 1.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.kernel_checks import CHECKS
from benchmarks.kernel_inputs import (
    plain_units,
    random,
    random_packed,
    random_rotated,
    running,
    topk,
    uneven,
    which_stay,
)
from benchmarks.shapes import SHAPES
from locret.kernels import (
    decode_packed,
    decode_sequences,
    expand_rotated,
    expand_units,
    gather_sequences,
    packed_shares,
    rotate_at_slots,
    select_sequences,
    store_units,
)
from locret.kernels.decode import decode_packed_reference
from locret.kernels.gather import gather_sequences_reference
from locret.kernels.packed import expand_rotated_reference, expand_units_reference
from locret.kernels.rotate import rotate_at_slots_reference, store_units_reference


@dataclass
class Timed:
    """A kernel to be timed: one call for each set of inputs, the same with plain PyTorch, the bytes
    that a call has to move, and whether plain PyTorch can be captured in a graph, too."""

    kernel: Sequence[Callable[[], Any]]
    plain: Sequence[Callable[[], Any]]
    nbytes: int
    captured: bool = True


def main() -> None:
    """Check, time, print a table and write the JSON."""
    given = _parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA device")
    torch.manual_seed(0)
    checks = {name: list(check()) for name, check in CHECKS.items()}
    failed = {name: bad for name, found in checks.items() if (bad := [f for f in found if f])}
    for name, found in checks.items():
        print(f"{name:<24} {'FAIL' if name in failed else 'ok'} in {len(found)} settings")
    for name, bad in failed.items():
        print(f"FAIL {name}: {len(bad)} settings disagree with the twin, first: {bad[0]}")
    times = _times(given)
    record.write(given.out, vars(given), {"failed": failed, "kernels": times})
    sys.exit(1 if failed else 0)


def _times(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    print(f"\n{'us a call':<24} {'kernel':>9} {'copy':>9} {'share':>7} {'plain':>9} {'host':>9}")
    times = {}
    for name, timed in _timed(given):
        kernel = _graph_seconds(timed.kernel, given.repeats)
        found = {
            "seconds": kernel,
            "copy_seconds": _copy_seconds(timed.nbytes, given.repeats),
            "plain_seconds": (_graph_seconds if timed.captured else _eager_seconds)(
                timed.plain, given.repeats
            ),
            "host_seconds": _host_seconds(timed.kernel[0]),
            "bytes": timed.nbytes,
        }
        found["share_of_copy"] = found["copy_seconds"] / kernel
        times[name] = found
        print(
            f"{name:<24} {1e6 * kernel:9.2f} {1e6 * found['copy_seconds']:9.2f} "
            f"{found['share_of_copy']:7.2f} {1e6 * found['plain_seconds']:9.2f} "
            f"{1e6 * found['host_seconds']:9.2f}"
        )
    return times


# What is timed, at the shape of one layer.


def _timed(given: argparse.Namespace) -> Iterator[tuple[str, Timed]]:
    shape = SHAPES[given.shape]
    heads = shape["num_key_value_heads"]
    queries = shape["num_attention_heads"]
    size = shape.get("head_dim", shape["hidden_size"] // queries)
    query = random(1, queries, 1, size, dtype=torch.bfloat16)
    yield from _timed_rotate(given, heads, size)
    yield from _timed_store(given, heads, size)
    equal = [given.budget] * heads
    for name, lengths in ((", equal", equal), (", ragged", uneven(heads, given.budget))):
        yield from _timed_sequences(given, name, lengths, query)
    yield from _timed_packed(given, heads, query)


def _timed_rotate(given: argparse.Namespace, heads: int, size: int) -> Iterator[tuple[str, Timed]]:
    slots, sets = given.budget + given.chunk, range(given.sets)
    cos, sin = random(2, 1, slots, size, dtype=torch.bfloat16).unbind()
    keys = [random(1, heads, slots, size, dtype=torch.bfloat16) for _ in sets]
    turned = [torch.empty_like(keys[0]) for _ in sets]
    yield (
        "rotate_at_slots",
        Timed(
            [_call(rotate_at_slots, keys[i], cos, sin, "half", turned[i]) for i in sets],
            [_call(rotate_at_slots_reference, keys[i], cos, sin, "half") for i in sets],
            2 * keys[0].nbytes + cos.nbytes + sin.nbytes,
        ),
    )


def _timed_store(given: argparse.Namespace, heads: int, size: int) -> Iterator[tuple[str, Timed]]:
    tails = [random(2, 1, heads, 512, size, dtype=torch.bfloat16) for _ in range(given.sets)]
    key, slot = random(1, heads, 1, size, dtype=torch.bfloat16), running([256])[1:]
    yield (
        "store_units",
        Timed(
            [_call(store_units, *tail, key, key, slot) for tail in tails],
            [_call(store_units_reference, *tail, key, key, slot) for tail in tails],
            4 * key.nbytes,
        ),
    )


def _timed_sequences(
    given: argparse.Namespace, name: str, lengths: Sequence[int], query: Tensor
) -> Iterator[tuple[str, Timed]]:
    """Selecting and gathering as many units as there were before the chunk, and a step over
    them."""
    heads, size, total = len(lengths), query.shape[3], sum(lengths)
    sets, offsets = range(given.sets), running(lengths)
    old = [_layer(total, size=size) for _ in sets]
    new = [_layer(1, heads, given.chunk, size=size) for _ in sets]
    numbers = which_stay(lengths, lengths, given.chunk, 0, 0)
    scores = [(old[i][2], new[i][2]) for i in sets]
    select = [(*scores[i], offsets, *numbers) for i in sets]
    index = [select_sequences(*arguments) for arguments in select]
    yield (
        f"select_sequences{name}",
        Timed(
            [_call(select_sequences, *arguments) for arguments in select],
            [_call(topk, *scores[i], lengths, lengths) for i in sets],
            sum(tensor.nbytes for tensor in (*scores[0], index[0])),
        ),
    )
    gather = [(old[i], new[i], index[i], offsets, offsets) for i in sets]
    yield (
        f"gather_sequences{name}",
        Timed(
            [_call(gather_sequences, *arguments) for arguments in gather],
            [_call(gather_sequences_reference, *arguments) for arguments in gather],
            2 * sum(tensor.nbytes for tensor in old[0]) + index[0].nbytes,
        ),
    )
    rest = [plain_units(lengths, (512, 256), size, query.dtype) for _ in sets]
    yield (
        f"decode_sequences{name}",
        Timed(
            [_call(decode_sequences, query, rest[i], size**-0.5) for i in sets],
            [_call(_sdpa, query, *rest[i][:2], lengths, size**-0.5) for i in sets],
            4 * size * (total + 256 * heads),
        ),
    )


def _layer(*shape: int, size: int) -> tuple[Tensor, ...]:
    """Keys, values, scores and source positions of so many units."""
    keys, values = random(2, *shape, size, dtype=torch.bfloat16)
    return keys, values, random(*shape), torch.zeros(shape, dtype=torch.int32, device="cuda")


def _timed_packed(
    given: argparse.Namespace, heads: int, query: Tensor
) -> Iterator[tuple[str, Timed]]:
    queries, size, sets = query.shape[1], query.shape[3], range(given.sets)
    lengths = [given.packed] * heads
    codes: dict[str, list[Any]] = {
        "": [random_packed(lengths, size, 4, 64) for _ in sets],
        ", rotated": [random_rotated(lengths, size, 3, 3) for _ in sets],
    }
    for name, packed in codes.items():
        shares = packed_shares(packed[0], lengths, queries // heads, query.dtype)
        rest = [plain_units([16] * heads, (512, 256), size, query.dtype) for _ in sets]
        every = [(query, packed[i], shares, rest[i], size**-0.5) for i in sets]
        tensors = (*packed[0].keys, packed[0].starts, *packed[0].values)
        yield (
            f"decode_packed{name}",
            Timed(
                [_call(decode_packed, *arguments) for arguments in every],
                [_call(decode_packed_reference, *arguments) for arguments in every],
                sum(x.nbytes for x in tensors) + 4 * heads * (16 + 256) * size,
                captured=False,
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
            captured=False,
        ),
    )


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _sdpa(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], scaling: float
) -> Tensor:
    """Attention of a row's query over contexts of these lengths, a call for each where they are
    unequal."""
    heads = len(lengths)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if len(set(lengths)) == 1:
        sides = (x.view(1, heads, lengths[0], -1) for x in (keys, values))
        return sdpa(query, *sides, scale=scaling, enable_gqa=True)
    groups = query.unflatten(1, (heads, -1)).unbind(1)  # [1, G, 1, D] each
    contexts = zip(groups, keys.split([*lengths]), values.split([*lengths]), strict=True)
    return torch.cat(
        [
            sdpa(q, k[None, None], v[None, None], scale=scaling, enable_gqa=True)
            for q, k, v in contexts
        ],
        1,
    )


def _copy_seconds(nbytes: int, repeats: int) -> float:
    """Of a copy that reads half of so many bytes and writes the other half, both from addresses
    that 64 bytes divide: elsewhere a copy takes up to three times as long."""
    sets = max(2, min(64, 2**28 // nbytes))
    half = max(1, nbytes // 128) * 64
    pairs = torch.ones(sets, 2, half, dtype=torch.uint8, device="cuda")
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


def _eager_seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    """Median seconds of one call that the host launches."""

    def each() -> None:
        for call in calls:
            call()

    return record.seconds(each, repeats, torch.device("cuda")) / len(calls)


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
