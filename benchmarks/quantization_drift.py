"""What a hundred evictions cost a quantized cache, next to quantizing the survivors once.

    python -m benchmarks.quantization_drift --out docs/results/quantization_drift.json

Keys are random (Student's t, 6 degrees of freedom; offsets and spreads differ by channel). Each
chunk is appended, then each head is cut back to its budget: by fresh random ranks (`random`), or by
ranks that a unit keeps (`fixed`). Errors are in units of a channel's spread. `again` is what
encoding all keys anew at every eviction would do; it needs no more blocks than full ones.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import record
from locret.cache.context import alike
from locret.cache.store import NewTokens, Store
from locret.quantization import make_scheme
from locret.quantization.packed import PackedKeys, pack_keys

HEADS = 2


class Setting(NamedTuple):
    budget: int
    chunk: int
    residual: int
    ranks: str


SETTINGS = [
    Setting(budget, chunk, residual, ranks)
    for (budget, chunk), residual, ranks in product(
        [(2048, 256), (2048, 1024), (8192, 1024), (16384, 1024)], [0, 16, 32], ["random", "fixed"]
    )
]


def main() -> None:
    """Run all settings and write their JSON."""
    given = _parser().parse_args()
    figures = []
    for setting in SETTINGS:
        figures.append(setting._asdict() | measure(setting, given.head_size, given.evictions))
        print(figures[-1])
    record.write(given.out, vars(given), {"drift": figures})


def measure(setting: Setting, head_size: int, evictions: int) -> dict[str, float]:
    """Errors after so many evictions, and what is held then."""
    torch.manual_seed(0)
    scheme = make_scheme("kivi", residual=setting.residual)
    store, again = Store(scheme), Store(scheme)
    offset, spread = torch.randn(head_size) * 3, torch.exp(torch.randn(head_size) * 0.5)
    originals, ranks = torch.empty(1, HEADS, 0, head_size), torch.empty(1, HEADS, 0)
    draw = torch.distributions.StudentT(torch.tensor(6.0))
    kept = alike(1, (setting.budget,) * HEADS, originals.device)
    for step in range(evictions + setting.budget // setting.chunk):
        keys = (draw.sample((1, HEADS, setting.chunk, head_size)) * spread + offset).half()
        fresh = torch.rand(1, HEADS, setting.chunk)
        originals, ranks = torch.cat([originals, keys.float()], 2), torch.cat([ranks, fresh], 2)
        first = step * setting.chunk
        new = NewTokens.of(keys, keys, torch.arange(first, first + setting.chunk))
        for each in (store, again):
            each.append(new)
        if originals.shape[2] <= setting.budget:
            continue
        by = ranks if setting.ranks == "fixed" else torch.rand(ranks.shape)
        index = by.topk(setting.budget, -1).indices.sort(-1).values
        originals, ranks = _at(originals, index), ranks.gather(2, index)
        for each in (store, again):
            each.retain(index.flatten(), kept)
        again.freeze(_unchanged, _unchanged, room=0)  # packs all keys anew
    packed = setting.budget - setting.residual
    originals = originals[:, :, :packed].flatten(0, 1)
    once = pack_keys(scheme, originals.flatten(0, 1).half(), (packed,) * HEADS)
    error, error_again, error_once = (
        ((x.dense(torch.float32).view_as(originals) - originals) / spread).square().mean().sqrt()
        for x in (_packed_keys(store), _packed_keys(again), once)
    )
    full_blocks = HEADS * -(-packed // scheme.group)
    return {
        "error": error.item(),
        "error_over_once": (error / error_once).item(),
        "again_over_once": (error_again / error_once).item(),
        "blocks_over_full_blocks": len(_packed_keys(store).tables[0]) / full_blocks,
        "bytes_over_16_bit": store.kv_bytes / (4 * HEADS * setting.budget * head_size),
    }


def _packed_keys(store: Store) -> PackedKeys:
    assert store.context is not None and store.context.packed_keys is not None
    return store.context.packed_keys


def _unchanged(keys: Tensor) -> Tensor:
    return keys


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--evictions", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
