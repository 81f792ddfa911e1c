"""A picture: bytes of the cache by length of the context, from the figures of `plan`.

    python -m benchmarks.memory_chart --out docs/pictures/memory.png

Nothing is loaded or run: bytes follow from the model's shape (`locret.engine.plan`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from benchmarks.shapes import SHAPES
from locret.engine.plan import SchemePlan, make_plan
from locret.evaluation.report import plotting, save_figure
from locret.quantities import parse_tokens

GIB = 2**30
LINES = {
    "all units, 16 bits": ("none", 16, None),
    "all units, rotated 3 bits": ("rotated", 3, None),
    "{budget:,} units, 16 bits": ("none", 16, "budget"),
    "{budget:,} units, rotated 3 bits": ("rotated", 3, "budget"),
}


def main(args: Sequence[str] | None = None) -> Path:
    given = _parser().parse_args(args)
    fields = dict(SHAPES[given.shape])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    lengths = [given.context * step // 16 for step in range(1, 17)]
    plans = {
        units: make_plan(config, memory=GIB, context=units).schemes
        for units in {min(n, most) for n in lengths for most in (given.budget, given.context)}
    }
    figure, axis = plotting().subplots(figsize=(7, 3.6), layout="constrained")
    for label, (name, bits, bound) in LINES.items():
        most = given.budget if bound else given.context
        stored = [plans[min(length, most)] for length in lengths]
        sizes = [bytes_of(schemes, name, bits) / GIB for schemes in stored]
        axis.plot([n / 1024 for n in lengths], sizes, label=label.format(budget=given.budget))
    axis.set(xlabel="context, K tokens", ylabel="cache, GiB", ylim=(0, None), title=given.shape)
    axis.grid(alpha=0.3)
    axis.legend()
    return save_figure(figure, given.out)


def bytes_of(schemes: Sequence[SchemePlan], name: str, bits: int) -> int:
    """What the whole context takes, stored so."""
    (found,) = [each for each in schemes if (each.name, each.bits) == (name, bits)]
    return found.context_bytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_chart", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--context", type=parse_tokens, default=parse_tokens("128K"))
    parser.add_argument("--budget", type=int, default=16_384, help="units a KV head keeps")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .svg, .pdf")
    return parser


if __name__ == "__main__":
    print(f"wrote {main()}")
