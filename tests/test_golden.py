"""The released Locret, reproduced on stock models: kept units, scores, answers, labels, losses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import locret
from locret.model.backbone import Backbone
from locret.policies import LocretPolicy
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.stock_logits import stock_prompt_labels

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["llama31_tiny", "phi3_tiny"]
# The released Phi-3 label pass rotates the answer's queries but meets prompt keys that are not
# rotated. It is a slip of that recipe, kept reproducible under this name.
RELEASED_PROMPT_KEYS = {"llama31_tiny": "rotated", "phi3_tiny": "unrotated"}

pytestmark = [
    pytest.mark.parametrize("name", NAMES),
    pytest.mark.parametrize("attn", ["eager", "sdpa"]),
]


class RecordingPolicy(LocretPolicy):
    def __init__(self, heads):
        super().__init__(heads)
        self.given = {}

    def score(self, chunk):
        scores = super().score(chunk)
        self.given.setdefault(chunk.layer_idx, []).append(scores)
        return scores

    def all_scores(self):
        return torch.stack([torch.cat(self.given[i], dim=-1)[0] for i in sorted(self.given)])


def load(name, attn):
    folder = GOLDEN / name
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attn
    ).eval()
    heads = locret.RetainingHeads.from_pretrained(folder / "heads.bin")
    params = json.loads((folder / "params.json").read_text())
    return model, heads, params, load_file(folder / "trace.safetensors")


def engine_of(model, policy, params):
    return locret.Engine(
        model,
        policy,
        budget=params["budget_size"],
        chunk_size=params["chunk_size"],
        stabilizers=params["stabilizers"],
        local_tokens=params["local_len"],
    )


def close(ours, theirs, tolerance=1e-4):
    """Within `tolerance` of the size of the numbers."""
    return (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


def whole_row(trace):
    return [Segment.single(trace["targets"].shape[-1], trace["input_ids"].shape[1])]


def test_prompt_keeps_the_same_units_with_the_same_scores(name, attn):
    model, heads, params, trace = load(name, attn)
    policy = RecordingPolicy(heads)
    context = trace["input_ids"][:, : -params["local_len"]]
    cache = engine_of(model, policy, params).prefill(context)
    kept = torch.stack([torch.stack(layer.source_positions[0]) for layer in cache.layers])
    assert torch.equal(kept, trace["kept_positions"].long())
    assert close(policy.all_scores(), trace["scores"])


def test_answer_is_the_same(name, attn):
    model, heads, params, trace = load(name, attn)
    engine = engine_of(model, LocretPolicy(heads), params)
    output = engine.generate(
        trace["input_ids"],
        max_new_tokens=params["max_new_tokens"],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answer = output.sequences[:, trace["input_ids"].shape[1] :]
    assert torch.equal(answer, trace["generated_ids"].reshape(1, -1).long())
    assert (output.logits[0] - trace["prompt_last_logits"]).abs().max() < 1e-4


def test_labels_and_losses_are_the_same(name, attn):
    model, heads, _, trace = load(name, attn)
    distillation = Distillation(
        Backbone(model), heads, keep_scores=True, prompt_keys=RELEASED_PROMPT_KEYS[name]
    )
    given = distillation(trace["input_ids"], whole_row(trace))
    assert close(torch.cat(given.targets), trace["targets"])
    for ours, released in (
        (given.regression, trace["loss_regression"]),
        (given.smoothness, trace["loss_smoothness"]),
    ):
        assert torch.allclose(ours, released.reshape(()), rtol=1e-4, atol=0)


def test_rotated_labels_are_those_of_stock_attention(name, attn):
    """The labels that training uses agree with the logits of the unmodified model."""
    model, heads, _, trace = load(name, attn)
    distillation = Distillation(Backbone(model, "by_length"), heads, keep_scores=True)
    ours = torch.cat(distillation(trace["input_ids"], whole_row(trace)).targets)
    stock = stock_prompt_labels(model, trace["input_ids"], trace["targets"].shape[-1])
    assert close(ours, stock)
    released_agrees = close(trace["targets"], stock)
    assert released_agrees == (RELEASED_PROMPT_KEYS[name] == "rotated")
