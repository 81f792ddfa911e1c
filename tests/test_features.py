"""What heads read: both taps against hooks on a stock forward, in training and in the engine."""

import pytest
import torch

import locret
from locret.heads.heads import FEATURES
from locret.model.backbone import Backbone
from locret.model.backends import attend
from locret.policies import LocretPolicy
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.kept import stacked
from tests.tiny_models import FAMILIES, distinct_prompt, prompt, tiny_heads, tiny_model


def attention_inputs(model, ids):
    """[layers] of [B, T, hidden size]: what stock attention layers are given."""
    taken, hooks = [], []

    def record(module, args, kwargs):
        taken.append((args[0] if args else kwargs["hidden_states"]).clone())

    for layer in model.model.layers:
        hooks.append(layer.self_attn.register_forward_pre_hook(record, with_kwargs=True))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return taken


def projections(model, layer_idx, hidden):
    """[Q, K, V] before RoPE by the model's own submodules."""
    attention = model.model.layers[layer_idx].self_attn
    if hasattr(attention, "qkv_proj"):
        return attention.qkv_proj(hidden)
    return torch.cat([getattr(attention, f"{name}_proj")(hidden) for name in "qkv"], dim=-1)


class Recording(LocretPolicy):
    def __init__(self, heads):
        super().__init__(heads)
        self.read, self.scores = {}, {}

    def score(self, chunk):
        scores = super().score(chunk)
        features = FEATURES[self.heads.config.tap](chunk)
        self.read.setdefault(chunk.layer_idx, []).append(features)
        self.scores.setdefault(chunk.layer_idx, []).append(scores)
        return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_is_the_attention_layers_input(family):
    model, ids = tiny_model(family), prompt(30, batch=2)
    expected, calls = attention_inputs(model, ids), []

    def run(call):
        calls.append(call)
        query, key = call.rotate(call.query, (0,), (30,)), call.rotate(call.key, (0,), (30,))
        return attend(query, key, call.value, call.scaling, "sdpa", weighting=call.weighting)

    with torch.no_grad(), Backbone(model, "by_length").attached(run):
        model(ids, use_cache=False)
    for call, stock in zip(calls, expected, strict=True):
        assert call.hidden.shape == (2, 30, Backbone(model).geometry.feature_width("hidden"))
        assert (FEATURES["hidden"](call) - stock).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_qkv_is_the_projections_of_the_layers_input(family):
    model, ids = tiny_model(family), prompt(30)
    inputs, calls = attention_inputs(model, ids), []

    def run(call):
        calls.append(call)
        return call.query.transpose(1, 2)

    with torch.no_grad(), Backbone(model).attached(run):
        model(ids, use_cache=False)
    assert torch.allclose(
        FEATURES["qkv"](calls[0]), projections(model, 0, inputs[0]), atol=1e-5
    )  # deeper layers saw another attention here


@pytest.mark.parametrize("family", ["llama", "phi3", "smollm3", "olmo2"])
def test_engine_scores_are_those_of_the_heads_on_the_layers_input(family):
    """Without evictions the engine's scores are the heads' on a stock forward's inputs."""
    model, ids = tiny_model(family), prompt(45)
    heads = tiny_heads(model, tap="hidden")
    policy = Recording(heads)
    engine = locret.Engine(
        model,
        policy,
        budget=100,
        chunk_size=7,
        stabilizers=3,
        local_tokens=5,
        longrope="by_length",
        decode_interval=8,  # scores are needed again
    )
    cache = engine.prefill(ids)
    for layer_idx, stock in enumerate(attention_inputs(model, ids)):
        assert (torch.cat(policy.read[layer_idx], dim=1) - stock).abs().max() < 1e-4
        head = heads.layers[layer_idx]
        naive = torch.stack(
            [head.fc2.weight @ head.act(head.fc1.weight @ token) for token in stock[0]], dim=1
        )
        assert (torch.cat(policy.scores[layer_idx], dim=-1)[0] - naive).abs().max() < 1e-4
        assert torch.equal(
            stacked(cache.layers[layer_idx].scores), torch.cat(policy.scores[layer_idx], dim=-1)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_with_heads_on_hidden_keeps_the_highest_and_answers(dtype):
    model = tiny_model("llama", vocab_size=512).to(dtype)
    heads = tiny_heads(model, tap="hidden")
    small = {"budget": 20, "stabilizers": 3, "local_tokens": 5}
    ids = distinct_prompt(60, 512)
    engine = locret.Engine(model, heads=heads, chunk_size=None, **small)
    layer = engine.prefill(ids).layers[0]
    hidden = attention_inputs(model, ids)[0]
    scores = engine.policy.heads[0](hidden)
    best = scores.topk(20).indices.sort().values
    assert torch.equal(stacked(layer.source_positions), best)
    answer = locret.Engine(model, heads=heads, chunk_size=7, **small).generate(
        ids, max_new_tokens=6, do_sample=False
    )
    assert answer.shape == (1, 66)


def test_both_taps_learn_the_same_labels_from_what_they_read():
    model, ids = tiny_model("llama"), prompt(40)
    given = {}
    for tap in ("qkv", "hidden"):
        heads = tiny_heads(model, tap=tap).requires_grad_(True).train()
        given[tap] = Distillation(Backbone(model), heads, keep_scores=True)(
            ids, [Segment.single(29, 40)]
        )
        given[tap].loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in heads.parameters())
        if tap == "hidden":
            inputs = attention_inputs(model, ids)
            for head, predictions, hidden in zip(
                heads.layers, given[tap].predictions, inputs, strict=True
            ):
                assert (head(hidden[:, :29]) - predictions).abs().max() < 1e-4
    for a, b in zip(given["qkv"].targets, given["hidden"].targets, strict=True):
        assert torch.equal(a, b)


def test_heads_of_one_tap_do_not_pass_for_the_others():
    model = tiny_model("llama", hidden_size=96)  # as wide as [Q, K, V]: only the record tells
    geometry = Backbone(model).geometry
    assert geometry.feature_width("qkv") == geometry.feature_width("hidden") == 96
    answers = {
        tap: locret.Engine(
            model,
            heads=tiny_heads(model, tap=tap),
            budget=20,
            chunk_size=None,
            stabilizers=0,
            local_tokens=5,
            decode_interval=8,
        ).prefill(prompt(60))
        for tap in FEATURES
    }
    scores = [stacked(cache.layers[0].scores) for cache in answers.values()]
    assert not torch.allclose(scores[0], scores[1])
