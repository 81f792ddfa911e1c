"""Which architectures are supported, why others are not, and how attaching works."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import locret
from locret.model.backbone import SUPPORTED, Backbone, check_supported, is_softcapped
from tests.tiny_models import FAMILIES, MIXED, prompt, tiny_config, tiny_model


def refusal(config):
    with pytest.raises(ValueError) as caught:
        check_supported(config)
    message = str(caught.value)
    assert message.startswith(f"model_type {config.model_type!r} is not supported: ")
    assert message.endswith(f"Supported: {', '.join(SUPPORTED)}")
    return message


def test_the_table_of_tested_models_lists_every_one():
    table = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text("utf-8")
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in row.split(", ")}
    assert sorted(name.strip("`") for name in listed) == sorted([*SUPPORTED, "model_type"])


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass(family):
    check_supported(tiny_config(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_tells_whether_layers_cap_their_logits(family):
    capped = []

    def layer(call):
        capped.append(call.weighting.softcap is not None)
        return call.query.transpose(1, 2)

    backbone = Backbone(tiny_model(family))
    with torch.no_grad(), backbone.attached(layer):
        backbone.decoder(input_ids=prompt(3), use_cache=False)
    assert {*capped} == {backbone.softcapped} == {is_softcapped(tiny_config(family))}


@pytest.mark.parametrize("family", ["mistral", "mixtral", "phi3", "starcoder2"])
def test_windows_that_span_all_positions_are_none(family):
    def windows(window):
        model = tiny_model(family, sliding_window=window, max_position_embeddings=512)
        return Backbone(model).windows

    assert windows(32) == (32, 32)
    assert windows(512) == windows(None) == (None, None)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
def test_windows_of_some_layers_only(family):
    def windows(used):
        given = {"sliding_window": 32, "max_window_layers": 1, "use_sliding_window": used}
        return Backbone(tiny_model(family, **given)).windows

    assert windows(False) == (None, None)
    assert windows(True) == (None, 32)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("cohere2", "sliding_attention layers, which need a cache of their own"),
        ("gemma3", "it reads more than text; load its language model alone"),
        ("minicpm3", "multi-head latent attention"),
        ("deepseek_v3", "multi-head latent attention"),
        ("deepseek_v2", "multi-head latent attention"),
        ("t5", "it is an encoder-decoder"),
        ("bart", "it is an encoder-decoder"),
        ("gpt2", "has not been tested"),
        ("gpt_neox", "has not been tested"),
        ("gemma", "has not been tested"),
        ("mamba", "linear_attention layers"),
        ("olmo", "has not been tested"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(family, reason):
    assert reason in refusal(AutoConfig.for_model(family))


def test_dynamic_rope_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "dynamic NTK RoPE" in refusal(tiny_config("llama", rope_parameters=rope))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "default"},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_other_scalings_are_stock_too(rope):
    model = tiny_model("llama", rope_parameters=rope | {"rope_theta": 10000.0})
    engine = locret.Engine(model, "full", budget=None, chunk_size=7, local_tokens=3)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        engine.generate(prompt(100), **greedy), model.generate(prompt(100), **greedy)
    )


def test_engine_refuses_an_unsupported_model():
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        locret.Engine(tiny_gpt2(), "full")


def tiny_gpt2():
    from transformers import GPT2LMHeadModel

    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=16)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("what", [torch.nn.Linear(2, 2), object(), None, "path/to/model"])
def test_what_is_no_transformers_model_is_refused(what):
    with pytest.raises(ValueError, match="expected a transformers causal language model, got"):
        locret.Engine(what, "full")


def test_models_that_cannot_generate_are_refused():
    from transformers import LlamaForSequenceClassification

    model = tiny_model("llama")
    for other in (model.model, LlamaForSequenceClassification(model.config)):
        with pytest.raises(ValueError, match="expected a transformers causal language model"):
            locret.Engine(other, "full")


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_is_that_of_the_projections(family):
    model = tiny_model(family)
    geometry = Backbone(model).geometry
    attention = model.model.layers[0].self_attn
    if hasattr(attention, "qkv_proj"):
        width = attention.qkv_proj.out_features
    else:
        width = sum(getattr(attention, f"{name}_proj").out_features for name in "qkv")
    assert geometry.feature_width("qkv") == width
    assert geometry.feature_width("hidden") == model.config.hidden_size
    assert geometry.num_layers == len(model.model.layers) - (family in MIXED)


def test_backend_is_the_one_that_the_model_was_loaded_with():
    assert Backbone(tiny_model("llama", attn_implementation="eager")).backend == "eager"
    assert Backbone(tiny_model("llama", attn_implementation="sdpa")).backend == "sdpa"


def test_a_model_without_an_engine_is_not_usable_by_our_name():
    model = tiny_model("llama")
    with Backbone(model).attached(lambda call: None):
        pass
    model.set_attn_implementation("locret")
    with pytest.raises(ValueError, match="only through locret.Engine; load the model with"):
        model(prompt(3))


def test_layers_without_rope_are_handed_over_without_rotation():
    model = tiny_model("smollm3")
    seen = []

    def run(call):
        seen.append((call.layer_idx, call.rotary is not None))
        return call.query.transpose(1, 2)

    with torch.no_grad(), Backbone(model).attached(run):
        model(prompt(3), use_cache=False)
    assert seen == [(0, True), (1, False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_arrive_before_rotation(family):
    """The same token at two places gives the same query and key in the first layer."""
    model, calls = tiny_model(family), []

    def run(call):
        calls.append(call)
        return call.query.transpose(1, 2)

    ids = torch.tensor([[5, 9, 5]])
    with torch.no_grad(), Backbone(model).attached(run):
        model(ids, use_cache=False)
    for x in (calls[0].query, calls[0].key, calls[0].value):
        assert torch.equal(x[:, :, 0], x[:, :, 2])
        assert not torch.equal(x[:, :, 0], x[:, :, 1])
    assert calls[0].query.shape == (1, 8, 3, 8)
    assert calls[0].key.shape == (1, 2, 3, 8)


def test_model_with_an_adapter_is_attached_inside():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = tiny_model("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    engine = locret.Engine(model, "full", budget=None, chunk_size=7, local_tokens=3)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    stock = model.generate(input_ids=prompt(50), **greedy)
    assert torch.equal(engine.generate(prompt(50), **greedy), stock)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=prompt(50), **greedy), stock)
    assert not any(module._forward_pre_hooks for module in model.modules())
