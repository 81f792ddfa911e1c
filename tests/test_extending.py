"""A new label, loss or head input is one function and one line in a table (under 30 lines), a new
quantization scheme one class (under 60)."""

from dataclasses import dataclass

import pytest
import torch

import locret
from locret.heads.heads import FEATURES, HeadsConfig, RetainingHeads
from locret.heads.targets import LABELS, LOSSES
from locret.model.backbone import Backbone
from locret.quantization import SCHEMES, Scheme
from locret.quantization.codes import refuse_unstorable
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.tiny_models import prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
ROW = [Segment.single(29, 40)]


def train(model, heads, loss="smooth_l1", steps=2):
    """Losses of so many steps on one row."""
    heads.requires_grad_(True).train()
    distillation = Distillation(Backbone(model), heads, loss=loss, keep_scores=True)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        given = distillation(prompt(40), ROW)
        optimizer.zero_grad()
        given.loss.backward()
        optimizer.step()
        found.append(given)
    assert found[-1].loss < found[-2].loss
    return found


def assert_answers(model, heads, tmp_path):
    """Heads go to a file, come back and score a prompt."""
    heads.save_pretrained(tmp_path / "heads")
    heads = RetainingHeads.from_pretrained(tmp_path / "heads")
    engine = locret.Engine(model, heads=heads, **SMALL)
    assert engine.prefill(prompt(60)).report()["units"] == [20, 20]
    assert engine.generate(prompt(60), max_new_tokens=4, do_sample=False).shape == (1, 64)


def test_a_label(monkeypatch, tmp_path):
    def mean_logit(view):
        keys = view.key[:, :, : view.prompt_length].transpose(2, 3)
        return (view.grouped(slice(None)) @ keys).float().mean(dim=2) * view.scaling

    monkeypatch.setitem(LABELS, "mean_logit", mean_logit)

    model = tiny_model("llama")
    heads = tiny_heads(model, label="mean_logit")
    new, paper = train(model, heads)[0], train(model, tiny_heads(model))[0]
    for a, b in zip(new.targets, paper.targets, strict=True):
        assert a.shape == b.shape
        assert (a <= b + 1e-5).all() and not torch.allclose(a, b)  # a mean and a maximum
    assert_answers(model, heads, tmp_path)


def test_a_loss(monkeypatch):
    def squared(predictions, targets):
        return (predictions - targets).square().mean()

    monkeypatch.setitem(LOSSES, "squared", squared)

    model = tiny_model("llama")
    given = train(model, tiny_heads(model), loss="squared")[0]
    naive = [squared(p, t) for p, t in zip(given.predictions, given.targets, strict=True)]
    assert given.regression == pytest.approx(sum(naive).item() / 2, rel=1e-5)


def test_a_head_input(monkeypatch, tmp_path):
    def key_and_norm(layer):
        keys = layer.key.transpose(1, 2).flatten(2)
        return torch.cat([keys, layer.hidden.norm(dim=-1, keepdim=True)], dim=-1)

    monkeypatch.setitem(FEATURES, "key_and_norm", key_and_norm)

    model = tiny_model("llama")
    assert Backbone(model).geometry.feature_width("key_and_norm") == 2 * 8 + 1
    heads = tiny_heads(model, tap="key_and_norm")
    train(model, heads)
    assert_answers(model, heads, tmp_path)


@dataclass(frozen=True)
class HalfStepScheme(Scheme):
    """Eight bits of the range of a block's channel or of a value's channels, no minimum stored."""

    name = "half_step"
    widths = (8,)
    bits: int = 8

    def encode_keys(self, x, usable):
        codes, scale = self._encode(x, -2)
        return (codes,), (scale.squeeze(-2),)

    def decode_keys(self, units, tables, head_size):
        return self._decode(units[0], tables[0])

    def encode_values(self, x, usable):
        return self._encode(x, -1)

    def decode_values(self, units, head_size):
        return self._decode(*units)

    def _encode(self, x, dim):
        refuse_unstorable(x)
        scale = (x.float().abs().amax(dim, keepdim=True) / 127).clamp(min=2.0**-14).half()
        return ((x.float() / scale.float()).round().clamp(-127, 127) + 128).to(torch.uint8), scale

    def _decode(self, codes, scale):
        return (codes.float() - 128) * scale.float()


@pytest.mark.parametrize("budget", [20, "16KiB"])
def test_a_quantization_scheme(monkeypatch, budget):
    monkeypatch.setitem(SCHEMES, HalfStepScheme.name, HalfStepScheme)

    model = tiny_model("llama")
    settings = {**SMALL, "budget": budget}
    quantization = {"name": "half_step", "group": 4, "residual": 3}
    engine = locret.Engine(model, "streaming_llm", quantization=quantization, **settings)
    plain = locret.Engine(model, "streaming_llm", **settings)
    one, other = (
        each.generate(
            prompt(60),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        ).logits[0]
        for each in (engine, plain)
    )
    report = engine.prefill(prompt(60)).report()
    if budget == SMALL["budget"]:
        assert report["kv_bytes"] < 0.75 * plain.prefill(prompt(60)).report()["kv_bytes"]
        assert 0 < (one - other).norm() < 0.05 * other.norm()
    else:
        assert report["total_bytes"] < 20 * 1024 and min(report["units"]) > SMALL["budget"]


@pytest.mark.parametrize("label", sorted(LABELS))
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("tap", sorted(FEATURES))
def test_all_there_are_go_together(label, loss, tap):
    model = tiny_model("qwen3")
    given = train(model, tiny_heads(model, label=label, tap=tap), loss, steps=3)
    assert all(torch.isfinite(target).all() for target in given[0].targets)


def test_names_vanish_with_their_functions(monkeypatch):
    geometry = Backbone(tiny_model("llama")).geometry
    with monkeypatch.context() as patch:
        patch.setitem(FEATURES, "mine", lambda layer: layer.hidden)
        assert HeadsConfig.for_geometry(geometry, 4, tap="mine").input_width == 64
    with pytest.raises(ValueError, match="tap 'mine' is unknown"):
        HeadsConfig.for_geometry(geometry, 4, tap="mine")
