"""Backbones with a PEFT adapter: wrapped or merged, they are the same model to locret."""

import argparse
import copy
import importlib.util
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import locret
from locret.commands.shared import load_heads
from locret.model.adapters import Adapter, warn_without
from locret.model.backbone import Backbone
from locret.model.loading import load_model
from locret.policies import LocretPolicy
from locret.policies.compose import AdaptiveHeads
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.kept import kept_of
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
        kept.append(kept_of(cache))
        answers.append(engine.generate(ids, **GREEDY))
    assert torch.equal(*answers)
    assert kept[0] == kept[1]


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


# --- an adapter of another model ---

WEIGHTS = "adapter_model.safetensors"


def saved(path, family="llama", config=None, **overrides):
    """A tiny model and an adapter of it, in folders of `path`; returns the two as PEFT has them."""
    model = tiny_model(family, **overrides)
    model.save_pretrained(path / "backbone")
    tiny_tokenizer().save_pretrained(path / "backbone")
    config = config or peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(path / "lora")
    return adapted


def lora(**given):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | given)


def change(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder, adapter):
    """What is said of an adapter, in one line and before any weight is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded")
        )
        with pytest.raises(ValueError) as error:
            load(folder, adapter=str(adapter))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


A, B = (f"model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in (2, 3))
MISFITS = {
    "deeper": ({"num_hidden_layers": 4}, ["does not fit the model: extra ", A, B]),
    "shallower": ({"num_hidden_layers": 1}, [": missing ", "model.layers.1.self_attn.q_proj"]),
    "wider": ({"hidden_size": 128}, ["misshapen", "lora_A.weight is (4, 128), expected (4, 64)"]),
    "more heads": ({"num_attention_heads": 16}, ["lora_B.weight is (128, 4), expected (64, 4)"]),
    "both": (
        {"num_hidden_layers": 3, "hidden_size": 128},
        ["; misshapen ", "(4, 128)", "extra model.layers.2"],
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_an_adapter_of_another_model_is_refused(kind, folder, tmp_path):
    overrides, says = MISFITS[kind]
    saved(tmp_path, **overrides)
    said = refused(folder, tmp_path / "lora")
    assert said.startswith(f"adapter {tmp_path / 'lora'} does not fit the model: ")
    assert all(part in said for part in says), said


def test_many_tensors_are_counted(folder, tmp_path):
    saved(tmp_path, config=lora(target_modules=ALL), num_hidden_layers=5)
    assert f"and {3 * 7 * 2 - 6} more" in refused(folder, tmp_path / "lora")


def test_layers_that_the_model_lacks_are_told_in_a_line(folder, tmp_path):
    saved(tmp_path, config=lora(layers_to_transform=[3]), num_hidden_layers=4)
    assert "does not fit the model" in refused(folder, tmp_path / "lora")


def test_a_module_of_the_adapter_s_own_is_compared_too(folder, tmp_path):
    saved(tmp_path, config=lora(modules_to_save=["lm_head"]))
    said = refused(folder, tmp_path / "lora")  # the folder's backbone knows more tokens
    assert "misshapen lm_head.modules_to_save.weight is (128, 64), expected (" in said
    name = "base_model.model.lm_head.weight"
    change(tmp_path / "lora" / WEIGHTS, lambda tensors: tensors.pop(name))
    assert ": missing lm_head.weight" in refused(tmp_path, tmp_path / "lora")


def test_values_that_are_no_numbers_are_refused(tmp_path):
    saved(tmp_path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    change(tmp_path / "lora" / WEIGHTS, lambda tensors: tensors[name][0].fill_(float("nan")))
    said = refused(tmp_path, tmp_path / "lora")
    assert said.endswith("not a number in model.layers.1.self_attn.q_proj.lora_B.weight")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: (path / WEIGHTS).unlink(), "has none of the files adapter_model.safetensors"),
        (lambda path: (path / WEIGHTS).write_bytes(b"abc"), "could not be read"),
        (
            lambda path: (path / WEIGHTS).rename(path / "adapter_model.bin"),
            "could not be read",
        ),
        (lambda path: (path / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "is not one that this"),
        (
            lambda path: (path / "adapter_config.json").write_text('{"peft_type": "NEW"}'),
            "is not one that this version of PEFT reads",
        ),
    ],
    ids=["no weights", "cut", "not a torch file", "no record", "cut record", "unknown type"],
)
def test_files_that_are_no_adapter_are_told_in_a_line(spoil, says, tmp_path):
    saved(tmp_path)
    spoil(tmp_path / "lora")
    assert says in refused(tmp_path, tmp_path / "lora")


FITTING = {
    "all linear": ("llama", lambda: lora(target_modules="all-linear")),
    "regex": ("llama", lambda: lora(target_modules=r".*layers\.1\.self_attn\.(q|v)_proj")),
    "some layers": ("llama", lambda: lora(layers_to_transform=[1])),
    "own modules": ("llama", lambda: lora(modules_to_save=["lm_head", "input_layernorm"])),
    "embeddings": ("llama", lambda: lora(target_modules=["q_proj", "embed_tokens"])),
    "tied": ("llama3.2", lambda: lora(modules_to_save=["lm_head"])),
    "some tokens": ("llama", lambda: lora(trainable_token_indices=[1, 5])),
    "biases": ("qwen2.5", lambda: lora(bias="all")),
    "dora, ranks": ("llama", lambda: lora(use_dora=True, rank_pattern={"q_proj": 2})),
    "pissa": ("llama", lambda: lora(init_lora_weights="pissa")),
    "task": ("llama", lambda: lora(task_type="CAUSAL_LM")),
    "experts": ("qwen3_moe", lambda: lora(target_parameters=["mlp.experts.down_proj"])),
    "fused": ("phi3", lambda: lora(target_modules=["qkv_proj"])),
    "ia3": ("llama", lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "adalora": (
        "llama",
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]),
    ),
    "norms": ("llama", lambda: peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "vectors": (
        "llama",
        lambda: peft.VBLoRAConfig(
            r=4,
            num_vectors=8,
            vector_length=8,
            save_only_topk_weights=True,  # the others are saved as infinite
            target_modules=["q_proj"],
        ),
    ),
}


@pytest.mark.parametrize("kind", FITTING)
def test_adapters_of_all_kinds_fit_their_model(kind, tmp_path):
    family, make = FITTING[kind]
    config = make()
    if getattr(config, "init_lora_weights", None) is True:
        config.init_lora_weights = False  # random, not zero
    adapted = saved(tmp_path, family, config)
    loaded = load(tmp_path, adapter=str(tmp_path / "lora")).model
    ids = prompt(40)
    assert (logits(loaded, ids) - logits(adapted, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["embeddings", "adalora"])
def test_comparing_draws_no_random_numbers(kind, tmp_path):
    family, make = FITTING[kind]
    config = saved(tmp_path, family, make()).config
    before = torch.get_rng_state()
    Adapter.find(str(tmp_path / "lora")).check_fit(config)
    assert torch.equal(before, torch.get_rng_state())


def test_embeddings_saved_for_more_tokens_are_the_model_s(tmp_path):
    adapted = saved(tmp_path)
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "lora" / WEIGHTS)
    load(tmp_path, adapter=str(tmp_path / "lora"))
    saved(tmp_path / "larger", vocab_size=256)
    assert "misshapen" in refused(tmp_path / "larger", tmp_path / "lora")


def test_weights_that_torch_saved_fit_too(tmp_path):
    adapted = saved(tmp_path)
    adapted.save_pretrained(tmp_path / "torch", safe_serialization=False)
    loaded = load(tmp_path, adapter=str(tmp_path / "torch")).model
    ids = prompt(40)
    assert (logits(loaded, ids) - logits(adapted, ids)).abs().max() < 1e-4


def test_an_evaluation_refuses_it_before_a_question_is_made(folder, tmp_path):
    from locret.evaluation.config import EvalConfig
    from locret.evaluation.questions import prepare

    saved(tmp_path, num_hidden_layers=4)
    config = EvalConfig(
        model=str(folder / "backbone"),
        adapter=str(tmp_path / "lora"),
        tasks=("ruler_niah_single_1",),
        setups=({"policy": "full"},),
        output=str(tmp_path / "out"),
        lengths=(300,),
    )
    with pytest.raises(ValueError, match="does not fit the model: extra"):
        prepare(config)


def test_a_training_of_heads_refuses_it(folder, tmp_path):
    module = pytest.importorskip("trainers.fit")
    saved(tmp_path, num_hidden_layers=4)
    training = module.HeadsModule(str(folder / "backbone"), adapter=str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="does not fit the model: extra"):
        training.configure_model()


def test_lm_eval_refuses_it(folder, tmp_path):
    pytest.importorskip("lm_eval")
    from locret.integrations.lm_eval import LocretLM

    saved(tmp_path, num_hidden_layers=4)
    with pytest.raises(ValueError, match="does not fit the model: extra"):
        LocretLM(str(folder / "backbone"), adapter=str(tmp_path / "lora"), device="cpu")


def test_a_checkpoint_without_all_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder / "backbone", tmp_path / "backbone")
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    config |= {"num_hidden_layers": 3}
    config.pop("layer_types", None)
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks 9 of its tensors: model.layers.2.input_layern"):
        load(tmp_path)


def test_prompt_learning_is_refused_by_the_engine_too():
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny_model("llama"), settings)
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter, which puts learned units"):
        locret.Engine(model, "keydiff", budget=20)


# --- heads that were trained on one ---


NONE = "trained on a model with the adapter 'some/lora', and none is given"


def heads_of_an_adapter(model):
    return tiny_heads(model, adapter="some/lora")


def test_heads_of_an_adapter_warn_once_without_one():
    model = tiny_model("llama")
    heads = heads_of_an_adapter(model)
    with pytest.warns(UserWarning, match=NONE):
        warn_without(heads, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_without(heads, False)
        warn_without(tiny_heads(model), False)
        warn_without(heads_of_an_adapter(model), True)


@pytest.mark.parametrize("given", ["heads", "copied", "policy", "composed"])
def test_an_engine_warns_once_where_it_is_made(given):
    model = tiny_model("llama")
    heads = heads_of_an_adapter(model)
    policy, settings = LocretPolicy(heads), {}
    if given in ("heads", "copied"):
        policy, settings = "locret", {"heads": heads.double() if given == "copied" else heads}
    elif given == "composed":
        policy = AdaptiveHeads(policy)
    with pytest.warns(UserWarning, match=NONE) as caught:
        for _ in range(2):
            locret.Engine(model, policy, budget=20, **settings)
    (warning,) = caught
    assert warning.filename == __file__


def test_an_engine_does_not_warn_where_there_is_an_adapter_or_heads_do_not_score(folder):
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        locret.Engine(model, "keydiff", heads=heads_of_an_adapter(model), budget=20)
        locret.Engine(model, heads=tiny_heads(model), budget=20)
    merged = load(folder, adapter=str(folder / "lora")).model
    for known in (merged, copy.deepcopy(merged), wrapped()):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            locret.Engine(known, heads=heads_of_an_adapter(known), budget=20)


def test_an_adapter_that_is_turned_off_is_none():
    model = wrapped()
    with model.disable_adapter(), pytest.warns(UserWarning, match=NONE):
        locret.Engine(model, heads=heads_of_an_adapter(model), budget=20)


def test_commands_warn_before_they_load_a_model_and_the_engine_is_silent_then():
    given = argparse.Namespace(heads="checkpoints/smollm2-heads", adapter=None)
    with pytest.warns(UserWarning, match="smollm2-adapter"):
        heads = load_heads(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warn_without(heads, False)
