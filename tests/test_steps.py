"""One-token steps with counters on the device give the answers of the plain path."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import locret
from locret.generation import Engine
from locret.kernels import decode_attention_quantized
from tests.tiny_models import FAMILIES, prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def both(monkeypatch):
    """Run something with and without steps; the plain twins stand in for the kernels."""

    def run(work):
        results = []
        for fast in (False, True):
            monkeypatch.setattr(Engine, "fast_steps", property(lambda self, fast=fast: fast))
            results.append(work())
        return results

    return run


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers(both, family, positions):
    model = tiny_model(family)
    heads = tiny_heads(model)

    def work():
        engine = locret.Engine(model, heads=heads, positions=positions, **SMALL)
        return engine.generate(prompt(60, batch=2), **GREEDY)

    plain, fast = both(work)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("budget", [20, [9, 30]])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_padded_rows_and_layers_that_hold_different_numbers(both, budget, positions):
    model = tiny_model("llama")
    ids = prompt(60, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :30], mask[2, :57] = 0, 0

    def work():
        settings = SMALL | {"budget": budget, "positions": positions}
        return locret.Engine(model, "random", **settings).generate(ids, mask, **GREEDY)

    plain, fast = both(work)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ["kivi", "layerquant"])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_steps_over_packed_units(both, monkeypatch, name, bits, positions):
    model = tiny_model("llama", num_hidden_layers=4)
    ids = prompt(60, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :30], mask[2, :57] = 0, 0
    seen = []
    monkeypatch.setattr("locret.steps.decode_attention_quantized", spied(seen))
    scheme = {"name": name, "bits": bits, "group": 16, "residual": 3}

    def work():
        settings = SMALL | {"budget": 20, "positions": positions, "quantization": scheme}
        return locret.Engine(model, "random", **settings).generate(ids, mask, **GREEDY)

    plain, fast = both(work)
    assert torch.equal(plain, fast)
    assert len(seen) >= 4


def spied(seen):
    def decode(*args):
        seen.append(args)
        return decode_attention_quantized(*args)

    return decode


@pytest.mark.parametrize("name", ["kivi", "kvquant", "fp8"])
def test_long_answers_are_packed_now_and_then(both, monkeypatch, name):
    model = tiny_model("llama")
    monkeypatch.setattr("locret.coded.STEPS", 11)
    scheme = {"name": name, "bits": 8, "group": 4, "residual": 3}

    def work():
        engine = locret.Engine(model, "streaming_llm", quantization=scheme, **SMALL)
        cache = engine.prefill(prompt(60))
        context, answers = cache.snapshot(), []
        for seed in range(2):
            for tokens in (40, 5):
                question = prompt(4, seed=seed)
                output = engine.generate(
                    question, cache=cache, max_new_tokens=tokens, do_sample=False,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
                answers.append(torch.stack(output.logits)[:3])
            for layer in cache.layers:
                known = layer.source_positions[0, 0, 20:].tolist()
                assert known == list(range(60, 60 + len(known)))
                assert layer.units.store.residual.held < 3 + 4
            cache.restore(context)
        return answers

    plain, fast = both(work)
    assert len(plain) == len(fast)
    assert (plain[0] - fast[0]).norm() < 0.05 * plain[0].norm()


def test_turns_snapshots_and_storage_that_runs_out(both, monkeypatch):
    model = tiny_model("llama")
    heads = tiny_heads(model)
    monkeypatch.setattr("locret.generation.DECODE_ROOM", 3)

    def work():
        engine = locret.Engine(model, heads=heads, **SMALL)
        cache = engine.prefill(prompt(60))
        context, answers = cache.snapshot(), []
        for seed in range(3):
            question = prompt(4, seed=seed)
            answers += engine.generate(question, cache=cache, **GREEDY).flatten().tolist()
            more = engine.generate(question, cache=cache, **GREEDY | {"max_new_tokens": 30})
            answers += more.flatten().tolist()
            for layer in cache.layers:
                known = layer.source_positions[0, 0, 20:].tolist()
                assert known == list(range(60, 60 + len(known)))
                assert (layer.scores[:, :, 20:] == 0).all()
            cache.restore(context)
        return answers

    plain, fast = both(work)
    assert plain == fast


def test_length_given_as_max_length_and_stopping_early(both):
    model = tiny_model("llama")

    class StopAt(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((ids.shape[0],), ids.shape[1] >= 65)

    def work():
        engine = locret.Engine(model, "random", **SMALL)
        stop = StoppingCriteriaList([StopAt()])
        return engine.generate(prompt(60), max_length=90, do_sample=False, stopping_criteria=stop)

    plain, fast = both(work)
    assert torch.equal(plain, fast)
    assert plain.shape == (1, 65)


def test_nothing_is_left_on_the_model(both):
    model = tiny_model("llama")
    before = {name: id(value) for name, value in vars(model).items()}
    kind = type(model)
    both(lambda: locret.Engine(model, "random", **SMALL).generate(prompt(60), **GREEDY))
    assert type(model) is kind
    assert {name: id(value) for name, value in vars(model).items()} == before


def test_scores_of_every_step_are_kept_apart(both):
    model = tiny_model("llama")

    def work():
        return (
            locret.Engine(model, "random", **SMALL)
            .generate(prompt(60), return_dict_in_generate=True, output_logits=True, **GREEDY)
            .logits
        )

    plain, fast = both(work)
    assert max((p - f).abs().max() for p, f in zip(plain, fast, strict=True)) < 1e-5


def test_graphs_are_refused_where_they_do_not_work():
    with pytest.raises(ValueError, match="graphs=True does not work here: the model is on cpu"):
        locret.Engine(tiny_model("llama"), "random", graphs=True, **SMALL)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("cudnn", "it needs a CUDA device"), ("flash_attn", "it needs a CUDA"), ("x", "is unknown")],
)
def test_backends_are_refused_where_they_do_not_work(backend, reason):
    with pytest.raises(ValueError, match=reason):
        locret.Engine(tiny_model("llama"), "random", backend=backend, **SMALL)
