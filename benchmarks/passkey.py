"""A pass key in a million tokens of noise, read by a model whose window is far smaller.

    python -m benchmarks.passkey --tokens 1000000 --depths 0.1,0.5,0.9 --out r.json

Each prompt hides one number at a depth of the passkey test's noise; the question comes after the
text was compressed, and the answer's first words are given. By default SmolLM2-135M (window 8,192)
with the shipped adapter and heads, compact positions. The JSON is written after every answer.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.answer_clock import AnswerClock, OutOfTime
from locret import Engine, RetainingHeads
from locret.evaluation.questions import Renderer
from locret.model.hooks import cache_of
from locret.model.loading import LoadedModel, load_model
from locret.policies import POLICIES, LocretPolicy
from locret.tasks.synthetic import as_sample, make_sample

GPU_TOKENS, CPU_TOKENS = 1_000_000, 65_536
REPORT_EVERY = 10.0  # seconds


def main(args: Sequence[str] | None = None) -> None:
    """Ask at every depth; print each answer and write all to the JSON."""
    given = _parser().parse_args(args)
    deadline = time.monotonic() + (given.max_time or float("inf"))
    heads = RetainingHeads.from_pretrained(given.heads) if given.heads else None
    loaded = load_model(
        given.model, dtype=given.dtype, device=given.device, adapter=given.adapter or None
    )
    engine = Engine(
        loaded.model,
        given.policy,
        heads=heads,
        budget=given.budget,
        chunk_size=given.chunk_size,
        positions="compact",
    )
    device = loaded.model.device
    tokens = given.tokens or (GPU_TOKENS if device.type == "cuda" else CPU_TOKENS)
    results: list[dict[str, Any]] = []
    figures = {
        "window": loaded.model.config.max_position_embeddings,
        "chunk_size": engine.config.reading.chunk_size,
        "stabilizers": engine.config.reading.stabilizers,
        "local_tokens": engine.config.reading.local_tokens,
        "results": results,
    }
    for depth in given.depths:
        clock = AnswerClock(device, deadline)
        engine.progress = Progress(clock, depth)
        try:
            results.append(_ask(loaded, engine, tokens, depth, given, clock))
        except OutOfTime as error:
            print(f"depth {depth}: {error}", flush=True)
            results.append({"depth": depth, "status": "out of time"})
        record.write(given.out, vars(given), figures, announce=False)
    found = sum(result.get("found", False) for result in results)
    print(f"found {found} of {len(results)}")
    record.write(given.out, vars(given), figures)


class Progress:
    """Says now and then how far the reading is, and ends it when the time given is over."""

    def __init__(self, clock: AnswerClock, depth: float) -> None:
        self.clock = clock
        self.depth = depth
        self.started = self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self.clock.check()
        now = time.monotonic()
        if now - self.said >= REPORT_EVERY:
            self.said = now
            rate = done / (now - self.started)
            print(f"depth {self.depth}: {done}/{total} tokens, {rate:.0f} a second", flush=True)


def _ask(
    loaded: LoadedModel,
    engine: Engine,
    tokens: int,
    depth: float,
    given: argparse.Namespace,
    clock: AnswerClock,
) -> dict[str, Any]:
    tokenizer: Any = loaded.tokenizer
    sample = make_sample("passkey", tokens, tokenizer, given.seed, depth, haystack="noise")
    prompt = Renderer(tokenizer, chat=True).render(as_sample(sample, str(given.seed)))
    ids = torch.tensor([prompt.ids], device=loaded.model.device)
    print(f"depth {depth}: reading {ids.shape[1]} tokens", flush=True)
    record.reset_peak(clock.device)
    clock.start()
    output = engine.generate(
        ids,
        max_new_tokens=given.max_new_tokens,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
    )
    record.synchronize(clock.device)
    answer = tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    held = cache_of(output).report()
    result = {
        "depth": depth,
        "status": "ok",
        "found": sample.score(answer) == 1.0,
        "answer": answer,
        "expected": sample.expected,
        "prompt_tokens": ids.shape[1],
        "units": max(held["units"]),
        "cache_bytes": held["total_bytes"],
        "first_token_seconds": clock.times[0],
        "token_seconds": clock.times,
    } | record.peaks_gib(clock.device)
    print(
        f"depth {depth}: {'found' if result['found'] else 'not found'}, {answer!r} for "
        f"{', '.join(sample.expected)}; {result['units']} units, "
        f"{clock.times[0]:.1f} s to the first token",
        flush=True,
    )
    return result


def _depths(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded:smollm2", help="Hub id, folder, or embedded")
    parser.add_argument("--adapter", default="checkpoints/smollm2-adapter", help="or ''")
    parser.add_argument("--heads", default="checkpoints/smollm2-heads", help="or ''")
    parser.add_argument(
        "--tokens", type=int, help=f"default {GPU_TOKENS:,}, on a CPU {CPU_TOKENS:,}"
    )
    parser.add_argument("--depths", type=_depths, default=[0.1, 0.5, 0.9])
    parser.add_argument("--budget", type=int, default=4096, help="units a KV head keeps")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--policy", default=LocretPolicy.name, choices=sorted(POLICIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    parser.add_argument("--device", default=None)
    parser.add_argument("--max-time", type=float, help="seconds; what is left is not run")
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
