"""What few bits cost in answers: our quantized caches beside transformers' own, nothing evicted.

    python -m benchmarks.quantized_quality --tokens 3000 --count 20 --out r.json

Every system answers the same needle prompts (`locret.tasks.synthetic`), greedily:
  full          stock generate with the full cache
  none          locret without eviction and quantization: the same tokens as `full`
  kivi-4        locret, nothing evicted, keys and values by a scheme in so many bits
  quanto-4      stock generate with `transformers.QuantizedCache`, where its packages are installed
The share found comes with its 95 % Wilson interval. The JSON is written after every system.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import QuantizedCache

from benchmarks import record
from benchmarks.transformers_backends import transformers_backends
from locret import Engine
from locret.evaluation.questions import Renderer
from locret.evaluation.results import wilson
from locret.model.hooks import as_argument
from locret.model.loading import LoadedModel, load_model
from locret.tasks import TASKS, TaskSettings
from locret.tasks.synthetic import HAYSTACK

Answer = Callable[[Tensor], Tensor]
"""The new tokens [n] after a prompt [1, n]."""


def main(args: Sequence[str] | None = None) -> None:
    """Ask every system, print a line of each and write the JSON."""
    given = _parser().parse_args(args)
    loaded = load_model(
        given.model, dtype=given.dtype, device=given.device, adapter=given.adapter or None
    )
    tokenizer: Any = loaded.tokenizer
    renderer = Renderer(tokenizer, chat=True)
    settings = TaskSettings(length=given.tokens, depths=given.count, data={HAYSTACK: "reference"})
    tasks = [TASKS[name](settings) for name in given.tasks]
    asked = [(task, sample) for task in tasks for sample in task.samples(given.count, renderer)]
    prompts = [
        torch.tensor([renderer.render(sample).ids], device=loaded.model.device)
        for _, sample in asked
    ]
    figures: dict[str, Any] = {"systems": {}, "refused": {}}
    full: list[str] = []
    for name, system in _systems(loaded, given, figures["refused"]):
        new = [system(ids) for ids in prompts]
        answers = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]
        full = full or answers
        scores = [
            task.score(sample, answer)["found"]
            for (task, sample), answer in zip(asked, answers, strict=True)
        ]
        hits, count = round(sum(scores)), len(scores)
        low, high = wilson(hits, count)
        figures["systems"][name] = {
            "found": hits,
            "count": count,
            "interval": [low, high],
            "answers_of_full": sum(a == b for a, b in zip(answers, full, strict=True)),
            "answers": answers,
        }
        print(
            f"{name:<12}{hits:>4}/{count}  ({low:.2f} to {high:.2f})  "
            f"{figures['systems'][name]['answers_of_full']} answers are those of full",
            flush=True,
        )
        record.write(given.out, vars(given), figures, announce=False)
    for name, reason in figures["refused"].items():
        print(f"{name:<12}not run: {reason}")
    record.write(given.out, vars(given), figures)


def _systems(
    loaded: LoadedModel, given: argparse.Namespace, refused: dict[str, str]
) -> Iterator[tuple[str, Answer]]:
    yield "full", _stock(loaded, given, lambda: None)
    yield "none", _ours(loaded, given, None)
    for bits in given.bits:
        for scheme in given.schemes:
            yield f"{scheme}-{bits}", _ours(loaded, given, {"name": scheme, "bits": bits})
        for backend, reason in transformers_backends().items():
            name = f"{backend}-{bits}"
            if backend == "fp8" or (backend == "quanto" and bits == 8):
                continue  # bits of its own, or none of these
            if reason is not None:
                refused[name] = reason
                continue
            yield name, _stock(loaded, given, _quantized(loaded, backend, bits))


def _ours(loaded: LoadedModel, given: argparse.Namespace, quantization: Any) -> Answer:
    engine = Engine(loaded.model, "full", quantization=quantization)
    limit = given.max_new_tokens

    def answer(ids: Tensor) -> Tensor:
        output = engine.generate(ids, max_new_tokens=limit, do_sample=False)
        return output[0, ids.shape[1] :]  # type: ignore[no-any-return]

    return answer


def _stock(loaded: LoadedModel, given: argparse.Namespace, make_cache: Callable[[], Any]) -> Answer:
    model: Any = loaded.model

    @torch.no_grad()
    def answer(ids: Tensor) -> Tensor:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **as_argument(model, make_cache(), "generate"),
            max_new_tokens=given.max_new_tokens,
            do_sample=False,
        )
        return output[0, ids.shape[1] :]  # type: ignore[no-any-return]

    return answer


def _quantized(loaded: LoadedModel, backend: str, bits: int) -> Callable[[], Any]:
    config, groups = loaded.model.config, {"axis_key": 0, "axis_value": 0, "q_group_size": 64}
    return lambda: QuantizedCache(backend, config, nbits=bits, **groups)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded:smollm2", help="Hub id, folder, or embedded")
    parser.add_argument("--adapter", default="checkpoints/smollm2-adapter", help="or ''")
    parser.add_argument("--tasks", nargs="+", default=["niah_single", "niah_multikey"])
    parser.add_argument("--tokens", type=int, default=3000, help="length of the prompts")
    parser.add_argument("--count", type=int, default=20, help="samples a task")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2])
    parser.add_argument("--schemes", nargs="+", default=["kivi"], help="of locret")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
