"""How many of our files and functions does a prompt token pass, and a token of an answer?

    python -m benchmarks.trace_token

A tiny random Llama on the CPU, heads of its own, nothing quantized. Counted are the files and
functions of locret that run while a chunk of one token is read, and while one token is answered
eagerly: what a reader has to follow. Attaching, and what runs once a request, is not counted. The
first token of an answer is told apart: with it the keys of the context are rotated, once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import locret
from benchmarks.shapes import random_model
from benchmarks.systems import Setting, random_heads
from locret.model.hooks import as_argument

PACKAGE = Path(locret.__file__).parent
BUDGET = 8


def main(args: Sequence[str] | None = None) -> None:
    """Trace both and print what was passed."""
    given = _parser().parse_args(args)
    for name, passed in traced().items():
        files = sorted({file for file, _ in passed})
        print(f"{name}: {len(files)} files, {len(passed)} functions")
        if given.list:
            print(*(f"  {file}  {function}" for file, function in sorted(passed)), sep="\n")
        else:
            print(*(f"  {file}" for file in files), sep="\n")


def traced() -> dict[str, set[tuple[str, str]]]:
    """File and function of all that a token passes, by what is done with the token."""
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    heads = random_heads(model, Setting(budget=BUDGET, heads_width=8))
    engine = locret.Engine(model, heads=heads, budget=BUDGET, chunk_size=4, stabilizers=1)
    ids = torch.arange(3, 3 + 4 * BUDGET)[None]
    token = ids[:, :1]
    with engine, torch.no_grad():
        cache = engine.prefill(ids)
        # The last chunk of a context of one token more.
        longer = torch.cat([ids, token], dim=1)
        chunks: list[set[tuple[str, str]]] = []
        forward: Any = engine._forward
        read = forward.store

        def counted(*given: Any) -> None:
            chunks.append(_passed(lambda: read(*given)))

        forward.store = counted
        try:
            engine.prefill(longer)
        finally:
            del forward.store
        answer = [_passed(lambda: model(token, **as_argument(model, cache))) for _ in range(2)]
    return {
        "a chunk of a prompt": chunks[-1],
        "the first token of an answer": answer[0],
        "a token of an answer": answer[1],
    }


def _passed(work: Callable[[], Any]) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()

    def see(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents and "<" not in frame.f_code.co_name:
            found.add((str(path.relative_to(PACKAGE)), frame.f_code.co_name))

    before = sys.gettrace()
    sys.settrace(see)
    try:
        work()
    finally:
        sys.settrace(before)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="every function, not only files")
    return parser


if __name__ == "__main__":
    main()
