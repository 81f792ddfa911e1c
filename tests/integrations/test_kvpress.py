"""The kvpress bridge keeps what our own engine keeps. Needs kvpress 0.5, else it is skipped."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed")

import locret  # noqa: E402
from locret.integrations.kvpress import LocretPress  # noqa: E402
from locret.model.hooks import as_argument  # noqa: E402
from tests.tiny_models import VOCAB, distinct_prompt, prompt, tiny_heads, tiny_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, KEPT = 96, 24
IDS = distinct_prompt(CONTEXT, VOCAB)
ENGINE_WORKS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 17)


def compressed(press, model, ids):
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(input_ids=ids, **as_argument(model.model, cache))
    return cache


def full_cache(model, ids):
    cache = DynamicCache()
    with torch.no_grad():
        model.model(input_ids=ids, **as_argument(model.model, cache))
    return cache


def positions(cache, full):
    """Source positions [B, H, S], ascending, of what a compressed cache holds, by its values."""
    found = []
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        distances = torch.cdist(layer.values.double(), whole.values.double())
        assert distances.amin(-1).max() < 1e-5
        found.append(distances.argmin(-1).sort(-1).values)
    return found


@pytest.mark.skipif(not ENGINE_WORKS, reason="the engine needs transformers 5.17 or newer")
@pytest.mark.parametrize("tap", ["qkv", "hidden"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_the_same_positions_as_our_engine_in_one_chunk(family, tap):
    model = tiny_model(family)
    heads = tiny_heads(model, tap=tap)
    engine = locret.Engine(
        model, heads=heads, budget=KEPT, chunk_size=None, stabilizers=0, positions="original",
        longrope="by_length",
    )  # fmt: skip
    ours = engine.prefill(IDS)
    cache = compressed(LocretPress(compression_ratio=0.75, heads=heads), model, IDS)
    found = positions(cache, full_cache(model, IDS))
    for layer, theirs, kept in zip(ours.layers, cache.layers, found, strict=True):
        assert torch.equal(torch.stack([torch.stack(row) for row in layer.source_positions]), kept)
        gaps = torch.cdist(layer.keys.double(), theirs.keys.double()).amin(-1)
        assert gaps.max() < 1e-4  # and the keys are rotated alike


def test_the_highest_scores_of_the_heads_are_kept():
    """Without our engine: heads on hidden states, layer 0, whose input nothing else changes."""
    model = tiny_model("llama")
    heads = tiny_heads(model, tap="hidden")
    layer = model.model.layers[0]
    with torch.no_grad():
        scores = heads[0](layer.input_layernorm(model.model.embed_tokens(IDS)))
    wanted = scores.topk(KEPT, dim=-1).indices.sort(-1).values
    cache = compressed(LocretPress(compression_ratio=0.75, heads=heads), model, IDS)
    assert torch.equal(positions(cache, full_cache(model, IDS))[0], wanted)


def test_decoding_does_not_compress_again():
    model = tiny_model("llama")
    press = LocretPress(compression_ratio=0.75, heads=tiny_heads(model))
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(input_ids=IDS, **as_argument(model.model, cache))
        model.model(
            input_ids=prompt(1, seed=2),
            **as_argument(model, cache),
            position_ids=torch.tensor([[CONTEXT]]),
        )
    assert [layer.keys.shape[2] for layer in cache.layers] == [KEPT + 1] * 2


def test_nothing_is_left_on_the_model():
    model = tiny_model("llama")
    compressed(LocretPress(compression_ratio=0.5, heads=tiny_heads(model)), model, IDS)
    assert [layer.keys.shape[2] for layer in full_cache(model, IDS).layers] == [96] * 2


def test_heads_are_loaded_by_name(tmp_path):
    model = tiny_model("llama")
    heads = tiny_heads(model)
    heads.save_pretrained(tmp_path / "heads")
    one, other = (
        compressed(LocretPress(compression_ratio=0.75, heads=given), model, IDS)
        for given in (heads, str(tmp_path / "heads"))
    )
    assert torch.equal(one.layers[1].keys, other.layers[1].keys)


def test_what_cannot_work_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="needs heads"):
        LocretPress(compression_ratio=0.5)
    with pytest.raises(ValueError, match="query-aware"):
        LocretPress(compression_ratio=0.5, heads=tiny_heads(model, query_tokens=4))
    other = tiny_heads(tiny_model("llama", num_attention_heads=4))
    with pytest.raises(ValueError, match="another backbone"):
        compressed(LocretPress(compression_ratio=0.5, heads=other), model, IDS)
    with pytest.raises(ValueError, match="does not cover Olmo2ForCausalLM"):
        olmo = tiny_model("olmo2")
        compressed(LocretPress(compression_ratio=0.5, heads=tiny_heads(olmo)), olmo, IDS)


@pytest.mark.skipif(not ENGINE_WORKS, reason="the engine needs transformers 5.17 or newer")
def test_our_engine_works_after_kvpress_was_imported():
    """kvpress wraps every attention function that transformers knows, also ours if it was used."""
    code = (
        "import torch, locret\n"
        "from tests.tiny_models import prompt, tiny_model\n"
        "model = tiny_model('llama')\n"
        "engine = locret.Engine(model, 'streaming_llm', budget=24, chunk_size=16, stabilizers=0)\n"
        "before = engine.generate(prompt(200), max_new_tokens=4, do_sample=False)\n"
        "import kvpress\n"
        "after = engine.generate(prompt(200), max_new_tokens=4, do_sample=False)\n"
        "assert torch.equal(before, after)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
