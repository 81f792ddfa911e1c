"""Backbones with a PEFT adapter: wrapped or merged, they are the same model to locret."""

import copy
import importlib.util

import pytest
import torch

import locret
from locret.backbone import Backbone
from locret.distillation import Distillation
from locret.models import load_model
from locret.segments import Segment
from tests.tiny_models import prompt, tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

peft = pytest.importorskip("peft")

GREEDY = {"max_new_tokens": 6, "do_sample": False}
SPOKEN = {"output_logits": True, "return_dict_in_generate": True}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"llama": ALL, "qwen3": ["q_proj", "v_proj"], "phi3": ["qkv_proj", "o_proj"]}
ROW = [Segment.single(29, 40)]


def wrapped(family="llama", targets=None, **overrides):
    """A tiny model with random LoRA weights, large enough to be heard."""
    base = tiny_model(family, **overrides)
    config = peft.LoraConfig(
        r=4, target_modules=targets or TARGETS[family], init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(base, config).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", sorted(TARGETS))
def test_without_a_budget_it_answers_as_its_own_stock_generate(family, positions):
    model, ids = wrapped(family), prompt(60, batch=2)
    engine = locret.Engine(
        model,
        "random",
        budget=None,
        chunk_size=7,
        local_tokens=5,
        positions=positions,
        longrope="by_length",
    )
    stock = model.generate(input_ids=ids, **GREEDY, **SPOKEN)
    ours = engine.generate(ids, **GREEDY, **SPOKEN)
    assert torch.equal(ours.sequences, stock.sequences)
    for a, b in zip(ours.logits, stock.logits, strict=True):
        assert (a - b).abs().max() < 1e-4
    with model.disable_adapter():
        assert (logits(model, ids)[:, -1] - stock.logits[0]).abs().max() > 1e-2
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_within_a_budget_wrapped_and_merged_keep_the_same():
    model, ids = wrapped(), prompt(60)
    heads = tiny_heads(model)
    settings = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
    answers, kept = [], []
    for merged in (False, True):
        if merged:
            model = model.merge_and_unload()
        engine = locret.Engine(model, heads=heads, **settings)
        cache = engine.prefill(ids)
        kept.append([layer.source_positions for layer in cache.layers])
        answers.append(engine.generate(ids, **GREEDY))
    assert torch.equal(*answers)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize("tap", ["qkv", "hidden"])
def test_heads_learn_on_it_and_the_adapter_does_not(tap):
    model = wrapped()
    assert any(p.requires_grad for p in model.parameters())  # the adapter's
    before = copy.deepcopy(model.state_dict())
    heads = tiny_heads(model, tap=tap).requires_grad_(True).train()
    twin = copy.deepcopy(heads)
    given = Distillation(Backbone(model), heads)(prompt(40), ROW)
    given.loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    with model.disable_adapter():
        plain = Distillation(Backbone(model), copy.deepcopy(heads))(prompt(40), ROW)
    assert not torch.allclose(plain.loss, given.loss, rtol=1e-2)

    merged = Distillation(Backbone(model.merge_and_unload()), twin)(prompt(40), ROW)
    merged.loss.backward()
    assert torch.allclose(given.loss, merged.loss, rtol=1e-4)
    for ours, theirs in zip(heads.parameters(), twin.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-3 * theirs.grad.abs().max()


def test_two_steps_on_it_lower_the_loss():
    heads = tiny_heads(model := wrapped("qwen3")).requires_grad_(True).train()
    distillation = Distillation(Backbone(model), heads)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    found = []
    for _ in range(3):
        loss = distillation(prompt(40), ROW).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found == sorted(found, reverse=True)


def test_value_weighted_labels_wait_for_the_output_projection_to_be_merged():
    model = wrapped(targets=["q_proj", "o_proj"])
    heads = tiny_heads(model, label="value_weighted")
    with pytest.raises(ValueError, match="wrapped by an adapter"):
        Distillation(Backbone(model), heads)(prompt(40), ROW)
    Distillation(Backbone(model.merge_and_unload()), heads)(prompt(40), ROW)
    free = wrapped(targets=["q_proj", "v_proj"])  # the output projection is as it was
    Distillation(Backbone(free), heads)(prompt(40), ROW)


# --- load_model ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone and an adapter of it on disk, and the two as PEFT puts them together."""
    folder = tmp_path_factory.mktemp("adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "backbone")
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "backbone")
    model = wrapped(vocab_size=len(tokenizer))
    model.save_pretrained(folder / "lora")
    return folder


def load(folder, **given):
    return load_model(str(folder / "backbone"), device="cpu", **given)


@pytest.fixture(scope="module")
def unmerged(folder):
    return peft.PeftModel.from_pretrained(load(folder).model, folder / "lora").eval()


def test_a_model_loaded_with_an_adapter_is_the_wrapped_one(folder, unmerged):
    adapter = str(folder / "lora")
    loaded, plain = load(folder, adapter=adapter), load(folder)
    assert (loaded.adapter, plain.adapter) == (adapter, None)
    assert not loaded.model.training
    assert not any(hasattr(module, "base_layer") for module in loaded.model.modules())
    ids = prompt(50, vocab=300)
    assert (logits(loaded.model, ids) - logits(unmerged, ids)).abs().max() < 1e-4
    assert (logits(loaded.model, ids) - logits(plain.model, ids)).abs().max() > 1e-2


def test_a_model_loaded_with_an_adapter_answers_as_the_wrapped_one(folder, unmerged):
    ids = prompt(50, vocab=300)
    model = load(folder, adapter=str(folder / "lora")).model
    engine = locret.Engine(model, "full", chunk_size=7, local_tokens=3)
    stock = unmerged.generate(input_ids=ids, **GREEDY, pad_token_id=0)
    assert torch.equal(engine.generate(ids, **GREEDY, pad_token_id=0), stock)


def test_an_adapter_that_is_not_there_is_an_error(folder):
    with pytest.raises(ValueError, match="nosuch"):
        load(folder, adapter=str(folder / "nosuch"))


def test_without_peft_the_package_is_named(folder, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a)
    )
    with pytest.raises(ValueError, match="needs the package peft: pip install peft"):
        load(folder, adapter=str(folder / "lora"))


def test_prompt_learning_is_refused_by_the_engine_too():
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny_model("llama"), settings)
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter, which puts learned units"):
        locret.Engine(model, "keydiff", budget=20)
