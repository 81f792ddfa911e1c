"""Budgets as a share of the context, and one for each layer; eviction while answering."""

import pytest
import torch

import locret
from locret.model.hooks import cache_of
from locret.quantities import Memory
from tests.reference import Settings, answer
from tests.tiny_models import distinct_prompt, prompt, tiny_heads, tiny_model

SMALL = {"chunk_size": 7, "stabilizers": 3, "local_tokens": 5}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.mark.parametrize(("share", "length", "kept"), [(0.5, 60, 30), (0.1, 60, 6), (0.01, 20, 1)])
def test_share_of_the_context(model, share, length, kept):
    engine = locret.Engine(model, "random", budget=share, **SMALL)
    assert engine.prefill(prompt(length)).report()["units"] == [kept, kept]


def test_share_takes_stabilizers_in_proportion(model):
    engine = locret.Engine(model, "random", budget=0.5, chunk_size=7)
    assert engine.config.reading.stabilizers == "auto"
    engine.prefill(prompt(60))
    assert engine.config.eviction(((30, 30), (30, 30))).stabilizers == 2500 * 30 // 16384


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1])
def test_share_outside_of_0_and_1_is_refused(model, share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        locret.Engine(model, "random", budget=share)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_one_budget_for_each_layer(model, positions):
    engine = locret.Engine(model, "random", budget=[9, 30], positions=positions, **SMALL)
    cache = engine.prefill(prompt(60))
    assert cache.report()["units"] == [9, 30]
    assert cache.report()["budget"] == (9, 30)
    text = engine.generate(prompt(60), max_new_tokens=9, do_sample=False)
    assert text.shape == (1, 69)


@pytest.mark.parametrize(
    ("budget", "layers"), [([9], "of the 2 layers"), ([9, 0], "layer"), ([9, 9, 9], "of the 2")]
)
def test_budgets_that_do_not_fit_the_layers_are_refused(model, budget, layers):
    with pytest.raises(ValueError, match=f"one whole number of at least 1 for each {layers}"):
        locret.Engine(model, "random", budget=budget)


def test_layers_with_room_for_everything_lose_nothing(model):
    engine = locret.Engine(model, "random", budget=[100, 100], **SMALL)
    ours = engine.generate(prompt(60), max_new_tokens=9, do_sample=False)
    assert torch.equal(ours, model.generate(prompt(60), max_new_tokens=9, do_sample=False))


@pytest.mark.parametrize("interval", [1, 4, 50])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_eviction_while_answering_is_the_naive_one(interval, kv_heads):
    model = tiny_model("llama", num_key_value_heads=kv_heads, vocab_size=4096)
    heads = tiny_heads(model)
    settings = Settings(11, 7, 3, 5, interval)
    ids = distinct_prompt(33, 4096)  # equal tokens would score alike in the first layer
    expected, longest = answer(model, heads, ids, settings, 25)
    engine = locret.Engine(model, heads=heads, budget=11, decode_interval=interval, **SMALL)
    given = engine.generate(ids, max_new_tokens=25, do_sample=False)
    assert given[0].tolist() == expected
    assert longest <= 11 + max(interval, 5) - 1


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_answers_of_any_length_stay_bounded(model, positions):
    engine = locret.Engine(
        model, "random", budget=20, decode_interval=6, positions=positions, **SMALL
    )
    cache = engine.prefill(prompt(60))
    sizes = []
    for _ in range(4):
        engine.generate(prompt(3), cache=cache, max_new_tokens=40, do_sample=False)
        sizes.append(cache.nbytes)
        assert max(cache.report()["units"]) <= 25
    assert cache.seen == 60 + 4 * 43 - 1
    assert max(sizes) <= 26 * 2 * 2 * (2 * 8 * 4 + 12)


@pytest.mark.parametrize("settings", [{}, {"positions": "original"}, {"quantization": "kvquant"}])
def test_eviction_while_answering_needs_scores_of_all_units(model, settings, tmp_path):
    settings = {"budget": 20, **SMALL, **settings}
    plain = locret.Engine(model, "random", **settings)
    bounded = locret.Engine(model, "random", decode_interval=6, **settings)
    with pytest.raises(ValueError, match="read by an engine without it and holds no scores"):
        bounded.generate(prompt(3), cache=plain.prefill(prompt(60)), max_new_tokens=2)
    cache = bounded.prefill(prompt(60))
    read = cache.snapshot()
    plain.generate(prompt(3), cache=cache, max_new_tokens=2)
    cache.save(tmp_path / "answered")
    loaded = locret.RetainedCache.load(tmp_path / "answered", model)
    for answered in (cache, loaded):
        with pytest.raises(ValueError, match="holds units without a score"):
            bounded.generate(prompt(3), cache=answered, max_new_tokens=2)
    cache.restore(read)
    assert bounded.generate(prompt(3), cache=cache, max_new_tokens=2).shape == (1, 5)


@pytest.mark.parametrize("interval", [0, -3])
def test_interval_is_checked(model, interval):
    with pytest.raises(ValueError, match="decode_interval is"):
        locret.Engine(model, "random", budget=20, decode_interval=interval, **SMALL)


@pytest.mark.parametrize("settings", [{"budget": "64MiB"}, {"budget": 0.5}])
def test_prompts_without_a_context_have_their_budget_while_answers_are_evicted(settings):
    model = tiny_model("llama")
    given = SMALL | settings | {"local_tokens": 20}
    engine = locret.Engine(model, "streaming_llm", decode_interval=8, **given)
    greedy = {"max_new_tokens": 40, "do_sample": False}
    output = engine.generate(prompt(20), return_dict_in_generate=True, **greedy)
    report = cache_of(output).report()
    if settings["budget"] == 0.5:
        assert report["budget"] == 10
        assert max(report["units"]) <= 10 + 8
    else:
        full = locret.Engine(model, "full", local_tokens=20)
        assert torch.equal(output.sequences, full.generate(prompt(20), **greedy))


def test_eviction_of_answers_is_not_handed_on_to_the_next_engine():
    model = tiny_model("llama")
    evicting, keeping = (
        locret.Engine(model, "streaming_llm", budget=12, decode_interval=interval, **SMALL)
        for interval in (4, None)
    )
    cache = evicting.prefill(prompt(60))
    evicting.generate(prompt(5), cache=cache, max_new_tokens=5)
    held = max(cache.report()["units"])
    keeping.generate(prompt(5), cache=cache, max_new_tokens=30, min_new_tokens=30)
    assert min(cache.report()["units"]) >= held + 30


def test_a_budget_of_words_that_mean_none_says_which_there_are(model):
    with pytest.raises(ValueError, match="budget is 'much'; expected a number of units .*2GiB"):
        locret.Engine(model, "random", budget="much", **SMALL)


def test_a_factor_is_a_share(model):
    factor, share = (
        locret.Engine(model, "random", budget=budget, **SMALL).prefill(prompt(64))
        for budget in ("8x", 0.125)
    )
    assert factor.report()["units"] == share.report()["units"] == [8, 8]


@pytest.mark.parametrize("nbytes", [40_000, "40kB"])
def test_the_old_name_of_a_budget_in_bytes_warns_the_caller(model, nbytes):
    with pytest.warns(FutureWarning, match="use budget='40000B'") as told:
        engine = locret.Engine(model, "random", budget_bytes=nbytes, **SMALL)
    assert told[0].filename == __file__
    assert engine.config.reading.budget == Memory(40_000)
