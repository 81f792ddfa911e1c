r"""Does a real model answer alike under kvpress 0.5 and under locret, policy by policy?

Needles in prompts of one length, read at once, an eighth of the units kept, positions as they were
(`original`), greedy answers. Query-agnostic: the prompt up to its question is compressed, then the
question is read. Query-aware: all but the last token is compressed. kvpress runs in a process of
its own, from a folder made as `benchmarks/kvpress_positions.py` says:

    python -m benchmarks.kvpress_answers --kvpress KVPRESS --out docs/results/kvpress_answers.json
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

RATIO = 0.875  # of the units that go
NEW_TOKENS = 12
WINDOW, KERNEL, SINKS, FUTURE = 32, 5, 4, 512
PYRAMID_WINDOW = 8  # small beside the budget, else kvpress gives all layers the same
NAMES = (
    "full",
    "expected_attention",
    "keydiff",
    "knorm",
    "pyramidkv",
    "snapkv",
    "streaming_llm",
    "tova",
)
PROTOCOLS = ("query_agnostic", "query_aware")
Prompt = dict[str, Any]
Answers = dict[str, list[dict[str, Any]]]


def main(args: Sequence[str] | None = None) -> None:
    """Ask under both; print how many answers are alike and right, and write all of them."""
    given = _parser().parse_args(args)
    if given.there is not None:
        given.out.write_text(json.dumps(answers_of_kvpress(given.there)))
        return
    from benchmarks import record
    from benchmarks.kvpress_positions import run_there

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model_and_prompts(given, folder)
        found = run_there(Path(__file__), folder, given.kvpress)
        theirs, versions = found["answers"], found["versions"]
        ours = answers_of_locret(folder, theirs)
        expected = [prompt["expected"] for prompt in read_prompts(folder)]
    figures = {run: compare(ours[run], theirs[run], expected) for run in ours}
    for run, result in figures.items():
        print(f"{run:<36}{result['alike']} of {result['count']} alike, {result['right']} right")
    settings = {n: getattr(given, n) for n in ("model", "adapter", "tokens", "count", "seed")}
    settings |= {"ratio": RATIO, "window": WINDOW, "kernel": KERNEL, "sinks": SINKS}
    settings |= {"pyramid_window": PYRAMID_WINDOW, "future": FUTURE, "new_tokens": NEW_TOKENS}
    record.write(given.out, settings, figures | {"kvpress_versions": versions})


def write_model_and_prompts(given: argparse.Namespace, folder: Path) -> None:
    """What both are given: float32 weights with the adapter in them, and tokens."""
    from locret.evaluation.questions import Renderer
    from locret.model.loading import load_model
    from locret.tasks import TASKS, TaskSettings
    from locret.tasks.synthetic import FIRST_SEED, HAYSTACK

    loaded = load_model(given.model, dtype="float32", device="cpu", adapter=given.adapter or None)
    config = copy.deepcopy(loaded.model.config)
    config.__dict__.pop("quantization_config", None)  # of the file it was read from
    plain = type(loaded.model)(config)
    plain.load_state_dict(loaded.model.state_dict())
    plain.save_pretrained(folder)
    tokenizer = loaded.tokenizer
    tokenizer.save_pretrained(folder)
    renderer = Renderer(tokenizer, chat=True)
    in_prose = TaskSettings(
        length=given.tokens,
        depths=given.count,
        seed=given.seed - FIRST_SEED,
        data={HAYSTACK: "reference"},
    )
    prompts = []
    for sample in TASKS["niah_single"](in_prose).samples(given.count, renderer):
        ids = list(renderer.render(sample).ids)
        question = sample.question.strip()
        asked = question + tokenizer.decode(ids).rpartition(question)[2]
        tail = tokenizer(asked, add_special_tokens=False)["input_ids"]
        assert ids[-len(tail) :] == tail
        prompts.append({"ids": ids, "question": len(tail), "expected": sample.answers[0]})
    (folder / "prompts.json").write_text(json.dumps(prompts))


def answers_of_kvpress(folder: Path) -> dict[str, Any]:
    """Answers by run, with the units that every layer kept. Runs where kvpress is importable, and
    locret need not be."""
    import kvpress
    from kvpress_positions import versions  # beside this file, which runs as a script

    presses: dict[str, Any] = {
        "full": nullcontext,  # called with a model, as a press
        "expected_attention": kvpress.ExpectedAttentionPress(RATIO, FUTURE, SINKS),
        "keydiff": kvpress.KeyDiffPress(RATIO),
        "knorm": kvpress.KnormPress(RATIO),
        "pyramidkv": kvpress.PyramidKVPress(RATIO, PYRAMID_WINDOW, KERNEL),
        "snapkv": kvpress.SnapKVPress(RATIO, WINDOW, KERNEL),
        "streaming_llm": kvpress.StreamingLLMPress(RATIO, SINKS),
        "tova": kvpress.TOVAPress(RATIO),
    }
    model, tokenizer = load(folder)
    answers: Answers = {}
    for name, protocol in product(NAMES, PROTOCOLS):
        print(f"kvpress: {name}, {protocol}", flush=True)
        answers[f"{name} {protocol}"] = [
            _answer_of_kvpress(model, tokenizer, presses[name], prompt, rest(prompt, protocol))
            for prompt in read_prompts(folder)
        ]
    return {"answers": answers, "versions": versions()}


def _answer_of_kvpress(
    model: Any, tokenizer: Any, press: Any, prompt: Prompt, rest: int
) -> dict[str, Any]:
    import torch
    from transformers import DynamicCache

    ids, cache = torch.tensor([prompt["ids"]]), DynamicCache()
    end = ids.shape[1]
    with torch.no_grad():
        with press(model):
            model.model(ids[:, : end - rest], past_key_values=cache)
        units = [layer.keys.shape[2] for layer in cache.layers]
        # A token at a time: no mask is made for layers that hold different numbers of units.
        for at in range(end - rest, end + NEW_TOKENS - 1):
            position = torch.tensor([[at]])
            output = model(ids[:, at : at + 1], past_key_values=cache, position_ids=position)
            if at >= end - 1:
                ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return {"answer": tokenizer.decode(ids[0, end:], skip_special_tokens=True), "units": units}


def answers_of_locret(folder: Path, theirs: Answers) -> Answers:
    """The same of locret, every layer with the budget that kvpress gave it."""
    from locret.policies.attention import ExpectedAttentionPolicy, PyramidKVPolicy, SnapKVPolicy
    from locret.policies.plain import StreamingLLMPolicy

    policies: dict[str, Any] = {
        "expected_attention": ExpectedAttentionPolicy(FUTURE, SINKS),
        "pyramidkv": PyramidKVPolicy(PYRAMID_WINDOW, KERNEL, "avg"),
        "snapkv": SnapKVPolicy(WINDOW, KERNEL),
        "streaming_llm": StreamingLLMPolicy(SINKS),
    }
    model, tokenizer = load(folder)
    answers: Answers = {}
    for name, protocol in product(NAMES, PROTOCOLS):
        print(f"locret: {name}, {protocol}", flush=True)
        run = f"{name} {protocol}"
        answers[run] = [
            _answer_of_locret(
                model,
                tokenizer,
                policies.get(name, name),
                prompt,
                rest(prompt, protocol),
                None if name == "full" else their["units"],
            )
            for prompt, their in zip(read_prompts(folder), theirs[run], strict=True)
        ]
    return answers


def _answer_of_locret(
    model: Any, tokenizer: Any, policy: Any, prompt: Prompt, rest: int, budget: list[int] | None
) -> dict[str, Any]:
    import torch

    import locret

    engine = locret.Engine(
        model,
        policy,
        budget=budget,
        chunk_size=None,
        stabilizers=0,
        local_tokens=rest,
        positions="original",
    )
    ids = torch.tensor([prompt["ids"]])
    output = engine.generate(ids, torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return {"answer": tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)}


def compare(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], expected: Sequence[str]
) -> dict[str, Any]:
    """How many answers are the same text, how many of ours are right, and all of them."""
    answers = [
        {"locret": own["answer"], "kvpress": other["answer"], "expected": right}
        for own, other, right in zip(ours, theirs, expected, strict=True)
    ]
    return {
        "count": len(answers),
        "alike": sum(said["locret"] == said["kvpress"] for said in answers),
        "right": sum(said["expected"] in said["locret"] for said in answers),
        "units": theirs[0]["units"],
        "answers": answers,
    }


def rest(prompt: Prompt, protocol: str) -> int:
    """Tokens that are read after the compression."""
    return prompt["question"] if protocol == "query_agnostic" else 1


def read_prompts(folder: Path) -> list[Prompt]:
    """`ids`, tokens of the `question` and what follows it, and the number `expected`."""
    return json.loads((folder / "prompts.json").read_text())


def load(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded:smollm2")
    parser.add_argument("--adapter", default="checkpoints/smollm2-adapter")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--kvpress", type=Path, help="folder that kvpress is installed in")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--there", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
