"""Heads that read features of the model as it evicts: labels, losses, and what the engine sees."""

from random import Random

import pytest
import torch

import locret
from locret.model.backbone import Backbone
from locret.training.distill import Distillation, EvictedReading, evicted_features
from tests.test_branches import IDS, ROW, assert_close
from tests.tiny_models import prompt, tiny_heads, tiny_model

RECORD = {
    "label": "log_max_prob",
    "bias": True,
    "defaults": {"budget": 16, "stabilizers": 4},
    "quotas": {"4": [[1.5, 0.5], [0.75, 1.25]]},
}


def trainable(model, **record):
    heads = tiny_heads(model, **RECORD | record).requires_grad_(True).train()
    with torch.no_grad():
        for parameter in heads.parameters():  # scores that differ, and so units that go
            parameter.mul_(5)
    return heads


def distill(model, heads, features=None, **options):
    """A row's result, and the gradients of its heads."""
    heads.zero_grad()
    given = {"alpha": 0.5, "loss": "smooth_l1_boundary", "keep_scores": True} | options
    distillation = Distillation(Backbone(model), heads, **given)
    distillation.recipe.loss.rows.fill_(1)  # the boundary's term counts
    result = distillation(IDS, ROW, features=features)
    result.loss.backward()
    return result, [p.grad.clone() for p in heads.parameters()]


def as_evicted(model, heads, compression=4, chunk_size=7, quantization=None, row=ROW):
    return evicted_features(Backbone(model), heads, IDS, row, compression, chunk_size, quantization)


@pytest.mark.parametrize("train_chunk_size", [None, 16])
@pytest.mark.parametrize("tap", ["qkv", "hidden"])
@pytest.mark.parametrize("family", ["llama", "qwen2.5", "gemma2", "qwen2-hybrid"])
def test_losses_are_those_of_whole_contexts_where_nothing_goes(family, tap, train_chunk_size):
    model = tiny_model(family)
    record = {"quotas": None} if "hybrid" in family or family == "gemma2" else {}
    heads = trainable(model, tap=tap, **record)
    full, expected = distill(model, heads)
    features = as_evicted(model, heads, compression=1, chunk_size=1000)
    ours, given = distill(model, heads, features, chunk_size=train_chunk_size)
    assert torch.allclose(ours.loss, full.loss, rtol=1e-4)
    for gradient, naive in zip(given, expected, strict=True):
        assert_close(gradient, naive, 1e-3)
    assert not any(features)  # a layer's are given up with its loss


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("quantization", [None, {"name": "rotated", "bits": 3}])
@pytest.mark.parametrize("quotas", [None, RECORD["quotas"]])
def test_features_are_what_scoring_sees_in_an_engine(quotas, quantization, batch):
    model = tiny_model("llama", head_dim=16)
    heads = trainable(model, quotas=quotas)
    row = [segment for segment in ROW if batch == 1] or ROW[:1]
    ids = IDS if batch == 1 else prompt(ROW[0].end, batch)
    ours = evicted_features(Backbone(model), heads, ids, row, 4, 7, quantization)
    for number, segment in enumerate(row):
        context = ids[:, segment.start : segment.last_prompt_end]
        budget = round(context.shape[1] / 4)
        engine = locret.Engine(
            model, heads=heads, budget=budget, chunk_size=7, quantization=quantization
        )
        assert engine.config.reading.stabilizers == budget // 4
        seen = [[] for _ in heads.layers]
        hooks = [
            head.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
            for head, read in zip(heads.layers, seen, strict=True)
        ]
        engine.prefill(context)
        for hook in hooks:
            hook.remove()
        for layer, chunks in zip(ours, seen, strict=True):
            assert len(chunks) == -(-context.shape[1] // 7)
            assert torch.equal(layer[number], torch.cat(chunks, dim=1))


def test_labels_are_of_the_whole_context_whatever_goes():
    model = tiny_model("llama")
    heads = trainable(model)
    full, _ = distill(model, heads)
    evicted, _ = distill(model, heads, as_evicted(model, heads))
    pairs = zip(full.targets, evicted.targets, strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    first, last = (
        [(a - b).abs().amax() for a, b in zip(x, y, strict=True)]
        for x, y in (
            (full.predictions[: len(ROW)], evicted.predictions[: len(ROW)]),
            (full.predictions[-len(ROW) :], evicted.predictions[-len(ROW) :]),
        )
    )
    assert max(first) < 1e-4  # the first layer reads the tokens themselves
    assert max(last) > 0.01


def test_the_loss_falls_while_heads_decide_what_goes():
    model, losses = tiny_model("llama"), []
    heads = tiny_heads(model, **RECORD).requires_grad_(True).train()
    optimizer = torch.optim.Adam(heads.parameters(), lr=2e-2)
    for _ in range(10):
        result, _ = distill(model, heads, as_evicted(model, heads), alpha=0)
        losses.append(float(result.loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_model(fails, monkeypatch):
    model = tiny_model("llama")
    heads = trainable(model)
    if fails:
        monkeypatch.setattr(heads[1], "forward", None)
        with pytest.raises(TypeError):
            as_evicted(model, heads)
    else:
        distill(model, heads, as_evicted(model, heads))
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in heads.modules())
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_backbone_trains_float32_heads():
    model = tiny_model("llama").bfloat16()
    heads = trainable(model)
    assert {x.dtype for layer in as_evicted(model, heads) for x in layer} == {torch.bfloat16}
    result, gradients = distill(model, heads, as_evicted(model, heads))
    assert torch.isfinite(result.loss)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_heads_learn_under_autocast_which_has_seen_them_without_gradients():
    """Autocast keeps copies of weights, which were without gradients in old versions of torch."""
    model = tiny_model("llama").bfloat16()
    heads = trainable(model)
    with torch.autocast("cpu", torch.bfloat16):
        features = as_evicted(model, heads)
        _, ours = distill(model, heads, [[*layer] for layer in features])
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = distill(model, heads, features)
    pairs = zip(ours, expected, strict=True)
    assert all(torch.equal(a, b) and b.abs().max() > 0 for a, b in pairs)


def test_what_a_row_draws_is_log_uniform_between_the_bounds():
    reading, rng = EvictedReading((2, 16), (100, 400), share=0.75), Random(0)
    drawn = [reading.drawn(rng) for _ in range(400)]
    taken = [one for one in drawn if one is not None]
    assert 270 < len(taken) < 330
    compressions, chunk_sizes = map(sorted, zip(*taken, strict=True))
    for found, least, middle, most in ((compressions, 2, 5.66, 16), (chunk_sizes, 100, 200, 400)):
        assert least <= found[0] < 1.1 * least and 0.9 * most < found[-1] <= most
        assert 0.8 * middle < found[len(found) // 2] < 1.25 * middle
    assert reading.middle == (pytest.approx(32**0.5), 200)
    assert EvictedReading((4, 4), (7, 7)).drawn(rng) == (4, 7)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"compressions": (0.5, 4)}, r"evicted compressions is \[0.5, 4\]; expected two numbers"),
        ({"chunk_sizes": (8, 4)}, r"evicted chunk_sizes is \[8, 4\]; .* first: \[4, 8\]"),
        ({"share": 1.5}, "evicted share is 1.5; expected a number from 0 to 1"),
        ({"quantization": "nosuch"}, "no quantization 'nosuch'"),
    ],
    ids=str,
)
def test_readings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        EvictedReading(**settings)
