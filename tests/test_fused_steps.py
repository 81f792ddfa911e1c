"""Fused steps compute what the model's own forward does; the plain twins stand in for kernels."""

import peft
import pytest
import torch
from torch import nn

import locret
from locret.engine.answering import Answering
from locret.engine.steps import StepCounts
from locret.model import linear
from locret.model.backbone import PRENORM, Backbone
from locret.model.prenorm import why_not_fused
from tests.tiny_models import prompt, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def both(monkeypatch):
    """Tokens and logits of an answer by the model's own steps, then by fused ones."""
    monkeypatch.setattr(Answering, "fast_steps", property(lambda self: True))

    def answer(model, expected=(0, 7), batch=2, **settings):
        given = []
        for fused in expected:
            reason = why_not_fused if fused else lambda *_: "it is compared"
            monkeypatch.setattr("locret.engine.answering.why_not_fused", reason)
            engine = locret.Engine(model, "random", **SMALL | settings)
            output = engine.generate(prompt(60, batch=batch), **GREEDY, **LOGITS)
            assert engine.last_steps == StepCounts(taken=7, fast=7, fused=fused)
            given.append((output.sequences, torch.stack(output.logits)))
        return given

    return answer


def assert_equal(stock, fused):
    assert torch.equal(stock[0], fused[0])
    torch.testing.assert_close(fused[1], stock[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("family", [*PRENORM, "phi4-mini"])
def test_logits_are_those_of_the_stock_step(both, family, heads):
    model = tiny_model(family, num_key_value_heads=heads)
    for norm in (m for m in model.modules() if hasattr(m, "variance_epsilon")):
        nn.init.normal_(norm.weight, mean=1)
    assert_equal(*both(model))


@pytest.mark.parametrize("family", [*PRENORM, "phi4-mini"])
def test_products_of_ours_are_those_of_the_modules(both, family, monkeypatch):
    ran = []
    for name in ("products", "gated_products"):
        real = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *args, f=real: ran.append(f) or f(*args))
    assert_equal(*both(tiny_model(family), batch=1))
    assert len(ran) == 7 * 2 * 4  # steps, layers, launches


@pytest.mark.parametrize("settings", [{"quantization": "rotated"}, {"positions": "original"}])
def test_settings_of_the_cache(both, settings):
    assert_equal(*both(tiny_model("qwen3", head_dim=64), **settings))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sixteen_bits_round_alike(both, family):
    stock, fused = both(tiny_model(family, hidden_act="gelu").to(torch.bfloat16))
    # One token may win over another by a rounding, and what follows it differs: only the first.
    assert (stock[1][:2] - fused[1][:2]).abs().max() < 0.03 * stock[1].abs().max()


def test_adapted_products_are_called(both):
    plain = both(tiny_model("llama"), batch=1)[0]
    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    stock, fused = both(peft.get_peft_model(tiny_model("llama"), config), batch=1)
    assert_equal(stock, fused)
    assert not torch.allclose(plain[1], stock[1])


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def with_mlp(model):
    model.model.layers[1].mlp = Doubled()


def with_hook(model):
    model.model.norm.register_forward_hook(lambda module, args, output: 2 * output)


def with_activation(model):
    model.model.layers[1].mlp.act_fn = nn.GELU()


def with_function(model):
    del model.model.layers[1].mlp.act_fn
    model.model.layers[1].mlp.act_fn = torch.tanh


def with_hooked_activation(model):
    act = model.model.layers[1].mlp.act_fn
    act.register_forward_hook(lambda module, args, output: 2 * output)


def with_forward(model):
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward


def with_wrapped_embedding(model):
    model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, Doubled())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_wrapped_embedding, "dtype of its embedding"),
        (lambda model: model.model.layers[0].mlp.train(), "training mode"),
        (lambda m: m.model.rotary_emb.register_forward_hook(print), "LlamaRotaryEmbedding was"),
        (with_mlp, "its Doubled was changed"),
        (with_hook, "its LlamaRMSNorm was changed, or has hooks"),
        (with_activation, "its GELU was changed"),
        (with_function, "its builtin_function_or_method was changed"),
        (with_hooked_activation, "its SiLUActivation was changed, or has hooks"),
        (with_forward, "its LlamaAttention was changed"),
        (nn.Module.train, "training mode"),
        (nn.Module.bfloat16, "stores torch.float32"),
        (lambda model: setattr(model.config, "hidden_act", "relu"), "the activation 'relu'"),
    ],
)
def test_changed_models_run_as_they_are(both, change, reason):
    model = tiny_model("llama")
    change(model)
    assert reason in why_not_fused(Backbone(model), torch.float32)
    if model.dtype == torch.float32:
        both(model, expected=[0])


def test_hooks_of_all_modules_are_run(both):
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    with handle:
        both(tiny_model("llama"), expected=[0])
    both(tiny_model("llama"), expected=[7])


def test_models_whose_parts_are_others_than_before_are_not_fused(monkeypatch):
    model = tiny_model("phi3")
    backbone = Backbone(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: 2 * x)
        assert "Phi3MLP was changed" in why_not_fused(backbone)
    assert why_not_fused(backbone) is None
    handle = model.model.layers[0].resid_mlp_dropout.register_forward_hook(lambda *_: None)
    with handle:
        assert "Dropout was changed, or has hooks" in why_not_fused(backbone)
    model.model.layers[1] = tiny_model("phi3").model.layers[1]
    assert "others than before" in why_not_fused(backbone)


class Weight(nn.Parameter):
    """One that kernels cannot read, as those of torchao."""


def transposed(weight):
    return nn.Parameter(weight.detach().t().contiguous().t())


@pytest.mark.parametrize("make", [Weight, transposed])
@pytest.mark.parametrize("family", ["phi3", "qwen2"])
def test_kernels_read_plain_weights_alone(monkeypatch, make, family):
    model = tiny_model(family)
    engine = locret.Engine(model, "keydiff", budget=20, chunk_size=1, local_tokens=1)
    expected = engine.generate(prompt(30), max_new_tokens=2)
    for name in ("products", "gated_products"):
        monkeypatch.setattr(f"locret.model.linear.{name}", None)
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().repeat(2, 1).t()[:, 0])
    for module in (m for m in model.modules() if isinstance(m, nn.Linear)):
        module.weight = make(module.weight)
    model.model.embed_tokens.register_forward_hook(lambda m, given, out: out.mT.contiguous().mT)
    assert torch.equal(engine.generate(prompt(30), max_new_tokens=2), expected)
    assert engine.last_chunks.fused == 29
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj)  # without a bias to ask for
    assert torch.equal(engine.generate(prompt(30), max_new_tokens=2), expected)


def test_norms_of_queries_and_keys_are_alike():
    model = tiny_model("qwen3")
    model.model.layers[1].self_attn.k_norm.variance_epsilon = 0.1
    assert "different eps" in why_not_fused(Backbone(model))


def test_autocast_and_other_architectures_are_not_fused():
    assert "nothing is fused for 'glm'" in why_not_fused(Backbone(tiny_model("glm")), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reason = why_not_fused(Backbone(tiny_model("llama")), torch.bfloat16)
    assert "autocast" in reason


def test_models_that_gave_hidden_states_are_still_fused(both):
    model = tiny_model("llama")
    model(prompt(3), output_hidden_states=True)
    assert_equal(*both(model))
