r"""Do one-shot policies keep the units that kvpress 0.5 keeps? Tiny random models, every head.

kvpress 0.5 needs an older transformers than locret, so that it runs in a process of its own:

    pip install --no-deps --target KVPRESS kvpress transformers==5.2.0 "tokenizers<0.23" \
        "huggingface-hub<2" "cachetools<6" "fire<0.7" termcolor
    python -m benchmarks.kvpress_positions --kvpress KVPRESS \
        --out docs/results/kvpress_positions.json
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LENGTH, BUDGET = 101, 33
WINDOW, KERNEL, SINKS, FUTURE = 8, 5, 4, 512
MODELS: dict[str, dict[str, Any]] = {
    "llama, grouped": {"model_type": "llama", "num_key_value_heads": 2},
    "llama, multi-head": {"model_type": "llama", "num_key_value_heads": 8},
    "qwen3, grouped": {"model_type": "qwen3", "num_key_value_heads": 2},
}
NAMES = (
    "expected_attention",
    "keydiff",
    "knorm",
    "pyramidkv",
    "snapkv",
    "streaming_llm",
    "tova",
)


def make_model(settings: dict[str, Any], folder: Path) -> None:
    """A random model and a prompt without repeated tokens, which would score alike."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **settings,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    ids = 3 + torch.randperm(509)[:LENGTH]
    (folder / "prompt.json").write_text(json.dumps(ids.tolist()))


def load(folder: Path) -> tuple[Any, Any]:
    """The model and the prompt [1, LENGTH]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, torch.tensor([json.loads((folder / "prompt.json").read_text())])


def kept_by_kvpress(folder: Path) -> dict[str, list[list[list[int]]]]:
    """Source positions by policy, layer and KV head. Runs where kvpress is importable."""
    import kvpress
    import torch
    from transformers import DynamicCache

    ratio = 1 - (BUDGET + 0.5) / LENGTH
    presses = {
        "expected_attention": kvpress.ExpectedAttentionPress(ratio, FUTURE, SINKS),
        "keydiff": kvpress.KeyDiffPress(ratio),
        "knorm": kvpress.KnormPress(ratio),
        "pyramidkv": kvpress.PyramidKVPress(ratio, WINDOW, KERNEL),
        "snapkv": kvpress.SnapKVPress(ratio, WINDOW, KERNEL),
        "streaming_llm": kvpress.StreamingLLMPress(ratio, SINKS),
        "tova": kvpress.TOVAPress(ratio),
    }
    model, ids = load(folder)

    def keys(*contexts: Any) -> list[Any]:
        cache = DynamicCache()
        with torch.no_grad():
            model.model(ids, past_key_values=cache)
        return [layer.keys[0] for layer in cache.layers]

    whole, kept = keys(), {}
    for name, press in presses.items():
        with press(model):
            compressed = keys()
        # A unit is found again by its key: no two are equal.
        kept[name] = [
            [sorted(torch.cdist(*pair).argmin(dim=1).tolist()) for pair in zip(*layer, strict=True)]
            for layer in zip(compressed, whole, strict=True)
        ]
    return kept


def kept_by_locret(
    folder: Path, theirs: dict[str, list[list[list[int]]]]
) -> dict[str, list[list[list[int]]]]:
    """The same of locret. PyramidKV's layers get the budgets that kvpress gave them."""
    import locret
    from locret.policies.attention import ExpectedAttentionPolicy, PyramidKVPolicy, SnapKVPolicy
    from locret.policies.plain import StreamingLLMPolicy

    policies: dict[str, Any] = {
        "expected_attention": ExpectedAttentionPolicy(FUTURE, SINKS),
        "pyramidkv": PyramidKVPolicy(WINDOW, KERNEL, "avg"),
        "snapkv": SnapKVPolicy(WINDOW, KERNEL),
        "streaming_llm": StreamingLLMPolicy(SINKS),
    }
    model, ids = load(folder)
    kept = {}
    for name in NAMES:
        budgets = [len(layer[0]) for layer in theirs[name]]
        engine = locret.Engine(
            model, policies.get(name, name), budget=budgets, chunk_size=None, stabilizers=0
        )
        layers = engine.prefill(ids).layers
        kept[name] = [[head.tolist() for head in x.source_positions[0]] for x in layers]
    return kept


def compare(ours: Any, theirs: Any) -> dict[str, Any]:
    """Whether every head of every layer kept the same units, and in how many heads it did."""
    pairs = [
        pair for layers in zip(ours, theirs, strict=True) for pair in zip(*layers, strict=True)
    ]
    equal = sum(sorted(a) == sorted(b) for a, b in pairs)
    return {
        "same": equal == len(pairs),
        "heads_equal": equal,
        "heads": len(pairs),
        "units": [len(layer[0]) for layer in theirs],
    }


def run_there(script: Path, folder: Path, kvpress: Path | None) -> dict[str, Any]:
    """What a script's `--there FOLDER --out FILE` writes, in a process of its own, with the folder
    `kvpress` in front of its search path."""
    out = folder / "kvpress.json"
    command = [sys.executable, str(script), "--there", str(folder), "--out", str(out)]
    environment = os.environ | ({"PYTHONPATH": str(kvpress)} if kvpress else {})
    subprocess.run(command, check=True, env=environment)
    return json.loads(out.read_text())


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}


def main() -> None:
    given = _parser().parse_args()
    if given.there is not None:
        found = {"kept": kept_by_kvpress(given.there), "versions": versions()}
        given.out.write_text(json.dumps(found))
        return
    from benchmarks.record import write

    figures: dict[str, Any] = {}
    for name, settings in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            make_model(settings, Path(folder))
            found = run_there(Path(__file__), Path(folder), given.kvpress)
            theirs = found["kept"]
            ours = kept_by_locret(Path(folder), theirs)
            figures[name] = {policy: compare(ours[policy], theirs[policy]) for policy in NAMES}
            figures["kvpress_versions"] = found["versions"]
    settings = {"length": LENGTH, "budget": BUDGET, "window": WINDOW, "kernel": KERNEL}
    write(given.out, settings | {"sinks": SINKS, "future": FUTURE}, figures)
    for name in MODELS:
        print(name, {policy: result["heads_equal"] for policy, result in figures[name].items()})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvpress", type=Path, help="folder that kvpress is installed in")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--there", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
