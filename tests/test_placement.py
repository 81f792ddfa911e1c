"""Backbones that are spread over devices, offloaded, or stored in few bits."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import locret
from locret.model.backbone import AttentionLayer, Backbone
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.tiny_models import MIXED, prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
PLACES = {
    "half": {"model.layers.1": "disk", "lm_head": "disk"},
    "whole": {"model.embed_tokens": "disk", "model.layers": "disk", "lm_head": "disk"},
}


def offloaded(model, places, folder):
    accelerate = pytest.importorskip("accelerate")
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    rest = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    device_map = {
        name: next((to for start, to in places.items() if name.startswith(start)), place)
        for name, place in rest.items()
    }
    return accelerate.dispatch_model(
        copy.deepcopy(model), device_map, main_device="cpu", offload_dir=str(folder)
    )


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("family", ["llama", *sorted(MIXED & {"gemma3_text", "gpt_oss"})])
def test_offloaded_weights(family, places, tmp_path):
    model = tiny_model(family)
    heads = tiny_heads(model)
    here = locret.Engine(model, heads=heads, **SMALL)
    spread = offloaded(model, PLACES[places], tmp_path / "weights")
    there = locret.Engine(spread, heads=heads, **SMALL)
    assert there.backbone.devices == {torch.device("cpu")}
    expected = here.generate(prompt(60), **GREEDY)
    assert torch.equal(there.generate(prompt(60), **GREEDY), expected)
    # A context belongs to the weights, wherever they lie.
    here.prefill(prompt(60)).save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", spread)
    assert torch.equal(
        there.generate(prompt(4), cache=loaded, **GREEDY),
        here.generate(prompt(4), cache=here.prefill(prompt(60)), **GREEDY),
    )


def test_heads_follow_their_layers(monkeypatch):
    """The meta device stands in for a second one."""
    model = tiny_model("llama")
    places = [torch.device("cpu"), torch.device("meta")]
    monkeypatch.setattr(AttentionLayer, "device", property(lambda self: places[self.layer_idx]))
    heads = tiny_heads(model)
    engine = locret.Engine(model, heads=heads, **SMALL)
    assert engine.backbone.devices == set(places)
    assert not engine.fast_steps
    assert [head.fc1.weight.device for head in engine.policy.heads.layers] == places
    assert {p.device for p in heads.parameters()} == {places[0]}  # the caller's stay


def test_units_follow_their_layers():
    model = tiny_model("llama")
    engine = locret.Engine(model, "random", **SMALL)
    cache = engine.prefill(prompt(60))
    layer, device = cache.layers[0], torch.device("meta")
    engine.generate(prompt(4), cache=cache, max_new_tokens=2)
    assert layer.store.tail.count
    layer.state["seen"] = torch.ones(1)
    layer.place(device)
    tensors = [*layer.store.tensors, layer.lengths, *layer.state.values()]
    assert {tensor.device for tensor in tensors} == {device}


def quantized(kind, model, folder):
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        model = copy.deepcopy(model)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model
    pytest.importorskip("bitsandbytes")
    model.save_pretrained(folder)
    bits = {"4 bits": {"load_in_4bit": True}, "8 bits": {"load_in_8bit": True}}[kind]
    config = BitsAndBytesConfig(**bits)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    loaded.generation_config = model.generation_config
    return loaded


@pytest.mark.parametrize("kind", ["torchao", "4 bits", "8 bits"])
def test_weights_of_few_bits(kind, tmp_path):
    shapes = {"head_dim": 32, "intermediate_size": 64}  # kernels want multiples of 32
    model = quantized(kind, tiny_model("llama", **shapes), tmp_path / "model")
    full = locret.Engine(model, "full", chunk_size=None, local_tokens=60)
    stock = model.generate(prompt(60), **GREEDY)
    assert torch.equal(full.generate(prompt(60), **GREEDY), stock)
    heads = tiny_heads(model)
    engine = locret.Engine(model, heads=heads, **SMALL)
    cache = engine.prefill(prompt(60))
    assert cache.report()["units"] == [20, 20]
    cache.save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    answers = [engine.generate(prompt(4), cache=each, **GREEDY) for each in (cache, loaded)]
    assert torch.equal(*answers)
    row = [Segment.single(29, 40)]
    given = Distillation(Backbone(model), heads.requires_grad_(True).train())(prompt(40), row)
    given.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in heads.parameters())
    weighted = Distillation(Backbone(model), tiny_heads(model, label="value_weighted"))
    if kind == "torchao":  # whose weights can be expanded
        assert weighted(prompt(40), row).loss.isfinite()
        return
    with pytest.raises(ValueError, match="it is quantized"):
        weighted(prompt(40), row)
