"""Heads train on backbones whose weights are stored in fewer bits."""

import importlib.util
import json

import pytest
import torch

import locret
from locret.evaluation.records import Session, read_sessions
from locret.model.backbone import Backbone
from locret.model.loading import load_model
from locret.model.weights import PACKAGES, check_weights, dtype_for
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.tiny_models import prompt, tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

SIZES = {"head_dim": 16, "intermediate_size": 128}  # bitsandbytes takes multiples of 32 on the CPU
SMALL = {"budget": 20, "chunk_size": 16, "stabilizers": 2, "local_tokens": 4}
ROW = [Segment.single(29, 40)]
SCHEMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not all(map(importlib.util.find_spec, ("accelerate", package))), reason="not installed"
        ),
    )
    for name, package in PACKAGES.items()
    if name != "fp8"  # tests/test_fp8.py
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama", **SIZES).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def distill(model, label="max_logit"):
    heads = tiny_heads(model, label=label).requires_grad_(True).train()
    result = Distillation(Backbone(model), heads, keep_scores=True)(prompt(40), ROW)
    result.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in heads.parameters())
    return result


@pytest.mark.parametrize("scheme", SCHEMES)
def test_heads_train_on_a_quantized_backbone(scheme, folder):
    whole = load_model(folder, dtype="float32", device="cpu").model
    loaded = load_model(folder, dtype="float32", device="cpu", quantization=scheme).model
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert type(weight) is not torch.nn.Parameter
    exact, given = distill(whole), distill(loaded)
    labels = torch.stack([given.targets[0].flatten(), exact.targets[0].flatten()])
    assert (0.999 if scheme == "int8" else 0.9) < torch.corrcoef(labels)[0, 1] < 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_label_that_needs_the_output_matrix(scheme, folder):
    model = load_model(folder, dtype="float32", device="cpu", quantization=scheme).model
    if scheme == "int8":
        whole = load_model(folder, dtype="float32", device="cpu").model
        ours, theirs = (distill(m, "value_weighted").regression for m in (model, whole))
        assert torch.allclose(ours, theirs, rtol=0.05)
    else:
        with pytest.raises(ValueError, match="it is quantized"):
            distill(model, "value_weighted")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_adapter_is_carried(scheme, folder, tmp_path):
    peft = pytest.importorskip("peft")
    plain = load_model(folder, dtype="float32", device="cpu", quantization=scheme).model
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_model("llama", **SIZES), config).save_pretrained(tmp_path)
    adapted = load_model(
        folder, dtype="float32", device="cpu", adapter=str(tmp_path), quantization=scheme
    ).model
    plain, adapted = distill(plain), distill(adapted.requires_grad_(False))
    assert not torch.allclose(plain.targets[0], adapted.targets[0], rtol=1e-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_adapter_of_another_model_is_refused(scheme, folder, tmp_path):
    peft = pytest.importorskip("peft")
    deeper = tiny_model("llama", **SIZES, num_hidden_layers=4)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(deeper, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit the model: extra model.layers.2"):
        load_model(folder, device="cpu", adapter=str(tmp_path), quantization=scheme)


def test_an_unknown_scheme_and_missing_packages_are_named(monkeypatch):
    with pytest.raises(
        ValueError, match=r"'int3' is unknown; expected one of \['fp8', 'int8', 'nf4'\]"
    ):
        check_weights("int3", CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"accelerate, torchao; pip install 'locret\[quant\]'"):
        check_weights("int8", CPU)


def test_fp8_is_refused_where_it_is_not_multiplied(folder, monkeypatch):
    said = (
        r"the model goes to cpu, but .* compute capability 8\.9 or above; take 'int8', which runs"
    )
    with pytest.raises(ValueError, match=said):
        load_model(folder, device="cpu", quantization="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"A100 has compute capability 8\.0, but .* take 'int8'"):
        check_weights("fp8", torch.device("cuda", 0))


def test_fp8_goes_with_bfloat16_alone():
    assert {dtype_for("fp8", dtype) for dtype in (None, torch.bfloat16)} == {torch.bfloat16}
    assert dtype_for("int8", None) is None
    with pytest.raises(ValueError, match="dtype is 'float16'; give bfloat16 or auto, or take"):
        dtype_for("fp8", torch.float16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_are_saved_in_fewer_bits_are_not_stored_in_others(folder, tmp_path, scheme):
    """transformers would load them as they are, under the other's name."""
    stored = load_model(folder, device="cpu", quantization=scheme)
    stored.model.save_pretrained(tmp_path)
    stored.tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").quantization is None
    for name in ("int8", "nf4"):
        said = f"saved in fewer bits already, .* in '{name}'; load them"
        with pytest.raises(ValueError, match=said):
            load_model(str(tmp_path), device="cpu", quantization=name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_evaluation_counts_the_parameters_that_are_stored(folder, tmp_path, scheme):
    whole = load_model(folder, device="cpu")
    for rank, loaded in enumerate((whole, load_model(folder, device="cpu", quantization=scheme))):
        Session(tmp_path, rank, 2, loaded, {})
    plain, stored = sorted(read_sessions(tmp_path), key=lambda session: session["rank"])
    assert plain["parameters"] == sum(weight.numel() for weight in whole.model.parameters())
    assert stored["parameters"] == plain["parameters"]
    assert (plain.get("weights"), stored["weights"]) == (None, scheme)


@pytest.mark.parametrize("others", SCHEMES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_contexts_know_how_weights_were_stored(folder, tmp_path, scheme, others):
    model, other = (
        load_model(folder, dtype="float32", device="cpu", quantization=name).model
        for name in (scheme, others)
    )
    locret.Engine(model, "keydiff", **SMALL).prefill(prompt(40)).save(tmp_path / "context")
    if scheme == others:
        file = tmp_path / "context" / "context.json"
        record = json.loads(file.read_text())
        del record["model"]["stored"]  # a context from before it was told
        file.write_text(json.dumps(record))
        assert locret.RetainedCache.load(tmp_path / "context", other).seen == 40
        return
    with pytest.raises(ValueError, match=r"context of another model.*: stored \['.*'\] there, \['"):
        locret.RetainedCache.load(tmp_path / "context", other)


def test_an_embedded_model_is_not_quantized():
    with pytest.raises(ValueError, match="cannot be stored in 'int8'; load them as they are"):
        load_model("embedded:smollm2", quantization="int8")
