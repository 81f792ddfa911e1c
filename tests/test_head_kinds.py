"""Heads of every kind on the way: saved, loaded, inspected, described, attached and trained."""

import json

import pytest
import torch
from safetensors.torch import load_file

import locret
from locret import RetainingHeads
from locret.cli import main
from locret.heads.hub import model_card
from locret.model.backbone import Backbone
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.tiny_models import prompt, tiny_heads, tiny_model

KINDS = {
    "linear": {"kind": "linear", "width": None},
    "linear with biases": {"kind": "linear", "width": None, "bias": True},
    "MLP with biases": {"bias": True},
}
NAMES = {
    "linear": ["fc.weight"],
    "linear with biases": ["fc.bias", "fc.weight"],
    "MLP with biases": ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"],
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def heads(model, kind):
    return tiny_heads(model, **KINDS[kind])


def test_they_are_saved_and_loaded(heads, kind, tmp_path):
    folder = heads.save_pretrained(tmp_path)
    names = [f"layers.{i}.{name}" for i in range(2) for name in NAMES[kind]]
    assert sorted(load_file(folder / "heads.safetensors")) == names
    loaded = RetainingHeads.from_pretrained(folder)
    assert loaded.config == heads.config
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_tensor_too_few_is_named(heads, kind):
    tensors = heads.state_dict()
    del tensors[f"layers.1.{NAMES[kind][0]}"]
    with pytest.raises(ValueError, match=f"missing layers.1.{NAMES[kind][0]}|1 tensors for 2"):
        RetainingHeads.from_tensors(heads.config, tensors)


def test_the_released_format_refuses_them(heads, kind, tmp_path):
    with pytest.raises(ValueError, match="holds MLPs without biases, and these heads are of kind"):
        heads.save_released(tmp_path / "heads.bin")
    folder = heads.save_pretrained(tmp_path / "heads")
    assert main(["convert", str(folder), str(tmp_path / "heads.bin")]) == 2
    assert main(["convert", str(folder), str(tmp_path / "again")]) == 0


def test_inspect_shows_the_norms_of_what_there_is(heads, kind, tmp_path, capsys):
    folder = str(heads.save_pretrained(tmp_path))
    assert main(["inspect", folder, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    shown = [name.removesuffix(".weight") for name in NAMES[kind]]
    assert [sorted(layer) for layer in layers] == [sorted(["layer", *shown])] * 2
    assert main(["inspect", folder]) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert all(f"norm {name}" in table[0] for name in shown)
    assert [len(line.split()) for line in table[1:]] == [1 + len(shown)] * 2


def test_the_card_says_which_kind_they_are(heads, kind):
    card = model_card(heads.config.to_dict())
    assert f"one\n{'matrix' if 'linear' in kind else 'small MLP'} a layer" in card
    assert ("| kind | linear |" in card) == ("linear" in kind)
    assert ("| bias | True |" in card) == ("biases" in kind)


def test_an_engine_reads_with_them(model, heads):
    engine = locret.Engine(model, heads=heads, budget=12, chunk_size=16, stabilizers=4)
    assert engine.generate(prompt(60), max_new_tokens=3).shape == (1, 63)


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_all_their_parameters_learn(model, heads, chunk_size):
    trained = heads.requires_grad_(True)
    distillation = Distillation(Backbone(model), trained, chunk_size=chunk_size)
    distillation(prompt(40), [Segment.single(30, 40)]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.parameters())
