"""An adapter that learns by KL of answers that see all of a trunk and what heads keep of it."""

import copy

import peft
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from locret.model.backbone import Backbone
from locret.training.gated import EvictedLoss
from tests.test_branches import branched
from tests.test_gated import HALF, IDS, ROW, made, norm_of_any_dtype
from tests.tiny_models import prompt, tiny_model

QUOTAS = {"quotas": {"2": [[2.0, 1.0], [0.5, 0.5]]}}


def student(model, heads, spread=0.0, **options):
    """A loss, what it trains, and the model that carries it."""
    torch.manual_seed(2)
    model = model.requires_grad_(False)
    targets = (
        ["qkv_proj"]
        if hasattr(model.model.layers[0].self_attn, "qkv_proj")
        else ["q_proj", "v_proj"]
    )
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets)).eval()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.to(model.dtype) + spread * torch.randn_like(p, dtype=model.dtype)
    loss = EvictedLoss(Backbone(adapted, "by_length"), heads, adapted.disable_adapter, **options)
    return loss, parameters, adapted


@pytest.mark.parametrize(
    ("family", "threshold"),
    [("llama", "global"), ("llama", "quotas"), ("qwen2-hybrid", "global"), ("phi3", "global")],
)
def test_an_adapter_that_does_nothing_loses_what_cold_gates_lose(family, threshold):
    options = {"threshold": threshold, "mean_over": "branches"}
    gated, heads = made(family, record=QUOTAS if threshold == "quotas" else {}, **options)
    cold = gated(IDS, ROW, HALF, 1e-6)
    loss, _, _ = student(gated.backbone.model, heads.eval(), **options)
    found = loss(IDS, ROW, HALF)
    assert found.loss == pytest.approx(cold.divergence.item(), rel=1e-4) and found.loss > 1e-4
    assert found.agreement == cold.agreement
    assert loss(IDS, ROW, [1.0, 1.0]).loss.abs() < 1e-6


def test_gradients_are_finite_differences(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_of_any_dtype)
    model = tiny_model("llama").double()
    _, heads = made(model=model, dtype=torch.float64)
    loss, parameters, adapted = student(model, heads, spread=0.3)
    weights = copy.deepcopy(adapted.state_dict())
    loss(IDS, ROW, HALF, parameters).loss.backward()
    for parameter in parameters:
        direction, values = parameter.grad / parameter.grad.norm(), []
        for step in (1e-6, -1e-6):
            parameter.data += step * direction
            values.append(loss(IDS, ROW, HALF).loss.item())
            parameter.data -= step * direction
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx(parameter.grad.norm().item(), rel=1e-4)
    assert all(p.grad is None for p in heads.parameters())
    for name, tensor in adapted.state_dict().items():
        torch.testing.assert_close(tensor, weights[name])
    assert not any(module._forward_pre_hooks for module in adapted.modules())


def test_layers_may_be_computed_again():
    found = []
    for recompute in (True, False):
        model = tiny_model("llama")
        _, heads = made(model=model)
        loss, parameters, _ = student(model, heads, spread=0.3, recompute=recompute)
        loss(IDS, ROW, HALF, parameters).loss.backward()
        found.append([p.grad for p in parameters])
    for again, kept in zip(*found, strict=True):
        torch.testing.assert_close(again, kept)


def test_an_output_layer_that_changes_is_refused():
    model = tiny_model("llama")
    _, heads = made(model=model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="adapter is on the output layer too"):
        EvictedLoss(Backbone(adapted), heads, adapted.disable_adapter)


def test_mixed_precision_chooses_the_same_units():
    """Scores in 16 bits would be equal by the dozen."""
    model = tiny_model("llama").bfloat16()
    _, heads = made(model=tiny_model("llama"))
    loss, _, _ = student(model, heads)
    row, masks = branched(600, [(4, 9)]), []
    for mixed in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            masks += loss._masks(prompt(row.end), [row], [5.0])
    assert torch.equal(*masks)
    assert (masks[0] == 0).sum() == round(masks[0].numel() / 5)
