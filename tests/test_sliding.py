"""Layers with a sliding window bound their cache by themselves; budgets hold for the others."""

import pytest
import torch

import locret
from locret.heads.heads import HeadsConfig
from locret.model.backbone import Backbone
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.kept import kept
from tests.test_batches import assert_each_row_as_alone
from tests.tiny_models import MIXED, SLIDING, WINDOW, prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
LAST = WINDOW - 1  # what a layer holds of its window for the next token


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
@pytest.mark.parametrize("family", sorted(MIXED))
def test_each_kind_of_layer_keeps_its_own(family, chunk_size, positions):
    model = tiny_model(family)
    settings = SMALL | {"chunk_size": chunk_size, "positions": positions}
    engine = locret.Engine(model, heads=tiny_heads(model), **settings)
    cache = engine.prefill(prompt(90))
    assert kept(cache, 0) == list(range(90 - LAST, 90))
    assert len(kept(cache, 1)) == 20
    report = cache.report()
    assert report["windows"] == [WINDOW, None]
    assert report["units"] == [LAST, 20]
    engine.generate(prompt(4), cache=cache, **GREEDY)
    seen = cache.seen
    assert kept(cache, 0) == list(range(seen - LAST, seen))
    assert kept(cache, 1)[20:] == list(range(90, seen))


@pytest.mark.parametrize("family", sorted(MIXED))
def test_a_budget_in_bytes_holds_the_windows_too(family):
    model, nbytes = tiny_model(family), 40_000
    settings = {"chunk_size": 50, "stabilizers": 3, "local_tokens": 5}
    for length in (400, 10):
        engine = locret.Engine(model, "random", budget=f"{nbytes}B", **settings)
        report = engine.prefill(prompt(length)).report()
        assert report["total_bytes"] <= nbytes
        assert report["total_bytes"] > 0.9 * nbytes or report["units"][1] == length
    with pytest.raises(ValueError, match="one unit in every KV head takes.*sliding windows"):
        locret.Engine(model, "random", budget="500B", **settings).prefill(prompt(60))


@pytest.mark.parametrize("family", SLIDING)
def test_a_backbone_of_windows_alone_is_bounded_whatever_the_budget(family):
    model = tiny_model(family)
    engine = locret.Engine(model, "random", longrope="by_length", **SMALL)
    stock = model.generate(prompt(70), **GREEDY)
    assert torch.equal(engine.generate(prompt(70), **GREEDY), stock)
    cache = engine.prefill(prompt(70))
    assert cache.report()["units"] == [LAST, LAST]
    assert_each_row_as_alone(engine, (40, 23, 4))


@pytest.mark.parametrize("family", SLIDING)
def test_heads_for_a_backbone_of_windows_alone_are_refused(family):
    with pytest.raises(ValueError, match="nothing for heads to decide"):
        HeadsConfig.for_geometry(Backbone(tiny_model(family)).geometry, 16)


@pytest.mark.parametrize(
    "family", ["mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2"]
)
def test_an_active_window_is_that_of_the_stock_model(family):
    given = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
    model = tiny_model(family, **given)
    assert WINDOW in Backbone(model).windows
    stock = model.generate(prompt(70), **GREEDY)
    engine = locret.Engine(model, "full", chunk_size=7, local_tokens=5, longrope="by_length")
    assert torch.equal(engine.generate(prompt(70), **GREEDY), stock)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_a_rotation_that_no_layer_has(family, kind):
    model = tiny_model(family, layer_types=[kind] * 2)
    stock = model.generate(prompt(70), **GREEDY)
    engine = locret.Engine(model, "full", chunk_size=7, local_tokens=5)
    assert torch.equal(engine.generate(prompt(70), **GREEDY), stock)


@pytest.mark.parametrize("window", [2, 3])
def test_the_smallest_windows(window):
    model = tiny_model("mistral", sliding_window=window)
    stock = model.generate(prompt(40), **GREEDY)
    engine = locret.Engine(model, "full", chunk_size=7, local_tokens=5)
    assert torch.equal(engine.generate(prompt(40), **GREEDY), stock)


@pytest.fixture(params=["gemma3_text", "gpt_oss"])
def mixed(request):
    model = tiny_model(request.param)
    return model, locret.Engine(model, heads=tiny_heads(model), **SMALL)


def test_snapshots_and_saved_contexts(mixed, tmp_path):
    model, engine = mixed
    cache = engine.prefill(prompt(60))
    cache.save(tmp_path / "context")
    before = cache.snapshot()
    first = engine.generate(prompt(4, seed=1), cache=cache, **GREEDY)
    cache.restore(before)
    assert torch.equal(engine.generate(prompt(4, seed=1), cache=cache, **GREEDY), first)
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    assert loaded.windows == (WINDOW, None)
    assert torch.equal(engine.generate(prompt(4, seed=1), cache=loaded, **GREEDY), first)


def test_beams_go_on_as_stock_does(mixed):
    model, _ = mixed
    engine = locret.Engine(model, "full", chunk_size=7, local_tokens=5)
    beams = GREEDY | {"num_beams": 3}
    assert torch.equal(engine.generate(prompt(50), **beams), model.generate(prompt(50), **beams))


def test_evicting_while_answering_bounds_every_layer(mixed):
    model, _ = mixed
    engine = locret.Engine(model, heads=tiny_heads(model), decode_interval=4, **SMALL)
    cache = engine.prefill(prompt(60))
    engine.generate(prompt(4), cache=cache, max_new_tokens=40, do_sample=False)
    units = cache.report()["units"]
    assert units[0] == LAST
    assert 20 <= units[1] < 24


def test_budgets_are_given_for_the_layers_that_they_hold_for(mixed):
    model, _ = mixed
    engine = locret.Engine(model, "random", **SMALL | {"budget": [12]})
    assert engine.prefill(prompt(60)).report()["units"] == [LAST, 12]
    with pytest.raises(ValueError, match="for each of the 1 layers"):
        locret.Engine(model, "random", **SMALL | {"budget": [12, 12]})


@pytest.mark.parametrize("label", ["max_logit", "max_prob", "value_weighted"])
def test_every_label_can_be_learned(mixed, label):
    model, _ = mixed
    heads = tiny_heads(model, label=label).requires_grad_(True).train()
    row = [Segment.single(29, 40)]
    given = Distillation(Backbone(model), heads, keep_scores=True)(prompt(40), row)
    given.loss.backward()
    assert len(given.targets) == 1
    assert all(p.grad.abs().max() > 0 for p in heads.parameters())
    assert (given.targets[0] < 1).all() or label != "max_prob"


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_softcaps_and_sinks_matter_in_these_models(family):
    """What the parity tests compare would not be the same without them."""
    model, plain = tiny_model(family), tiny_model(family)
    for layer in plain.model.layers:
        if family == "gemma2":
            layer.self_attn.attn_logit_softcapping = None
        else:
            layer.self_attn.sinks.data.fill_(-100.0)
    with torch.no_grad():
        difference = model(prompt(30)).logits - plain(prompt(30)).logits
    assert difference.abs().max() > 1e-2


def test_one_token_steps_are_for_plain_layers_only(mixed):
    model, _ = mixed
    backbone = Backbone(model)
    assert not backbone.plain
    assert Backbone(tiny_model("llama")).plain
