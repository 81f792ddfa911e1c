"""Models that call their cache `cache`, as transformers does since 5.24, or `past_key_values`."""

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import locret
from locret.engine.answering import Answering
from locret.engine.engine import Engine
from locret.model.hooks import CACHE_NAMES, as_argument, as_before, cache_in, cache_of
from tests.tiny_models import prompt, tiny_heads, tiny_model

ROOT = Path(__file__).resolve().parents[1]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def native():
    """The name that the installed transformers uses."""
    return next(iter(as_argument(tiny_model("llama"), None)))


def renamed(kwargs, old, new):
    return {new if key == old else key: value for key, value in kwargs.items()}


def takes_only(name, function):
    """`function` with its cache called `name`, and by no other name."""
    stock = native()

    def method(self, *args, **kwargs):
        assert not (set(CACHE_NAMES) - {name}) & set(kwargs), f"called by another name than {name}"
        return function(self, *args, **renamed(kwargs, name, stock))

    shown = inspect.signature(function)
    parameters = [
        each.replace(name=name) if each.name in CACHE_NAMES else each
        for each in shown.parameters.values()
    ]
    method.__signature__ = shown.replace(parameters=parameters)
    return method


def speaking(kind, name):
    """A subclass of a stock module whose `forward` takes the cache as `name` alone."""
    stock = native()

    def call(self, *args, **kwargs):
        # Stock code stands for code of the same release as this module.
        if sys._getframe(1).f_globals["__name__"].startswith("transformers."):
            kwargs = renamed(kwargs, stock, name)
        return kind.__call__(self, *args, **kwargs)

    # The rotation is looked up where the attention layer stands.
    body = {"__module__": kind.__module__, "__call__": call}
    body["forward"] = takes_only(name, kind.forward)
    if hasattr(kind, "generate"):
        prepare = takes_only(name, kind.prepare_inputs_for_generation)

        def prepared(self, *args, **kwargs):
            return renamed(prepare(self, *args, **renamed(kwargs, stock, name)), stock, name)

        prepared.__signature__ = prepare.__signature__
        body["prepare_inputs_for_generation"] = prepared
        body["generate"] = takes_only(name, kind.generate)
        body["_validate_model_kwargs"] = lambda self, given: None  # knows the stock name alone
    return type(kind.__name__, (kind,), body)


def model_with(name):
    """A tiny Llama of which every part that takes a cache calls it `name`."""
    model = tiny_model("llama")
    for module in model.modules():
        if set(CACHE_NAMES) & set(inspect.signature(module.forward).parameters):
            module.__class__ = speaking(type(module), name)
    return model


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_models_of_either_name_answer_alike(name, fast, monkeypatch):
    monkeypatch.setattr(Answering, "fast_steps", property(lambda self: fast))
    stock, model = tiny_model("llama"), model_with(name)
    settings = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
    expected = Engine(stock, heads=tiny_heads(stock), **settings).generate(prompt(60), **GREEDY)
    engine = Engine(model, heads=tiny_heads(model), **settings)
    assert torch.equal(engine.generate(prompt(60), **GREEDY), expected)
    cache = engine.prefill(prompt(60))
    first = engine.generate(prompt(4), cache=cache, **GREEDY)
    assert cache.report()["units"] == [20 + first.shape[1] - 1] * 2
    engine = Engine(model, "full")
    assert torch.equal(engine.generate(prompt(60), **GREEDY), stock.generate(prompt(60), **GREEDY))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_models_under_test_know_one_name(name):
    model, (other,) = model_with(name), set(CACHE_NAMES) - {name}
    with locret.Engine(model, "full") as engine, pytest.raises(AssertionError, match="another"):
        model(prompt(4), **{other: engine.prefill(prompt(9))})
    assert as_argument(model, 1) == as_argument(model, 1, "generate") == {name: 1}
    assert as_argument(model.model.layers[0].self_attn, 1) == {name: 1}


def test_the_cache_is_found_under_either_name():
    for name in CACHE_NAMES:
        assert cache_in({name: 1, "use_cache": True}) == 1
        assert cache_of(SimpleNamespace(**{name: 1})) == 1
    assert cache_in({}) is None
    layer = tiny_model("llama").model.layers[1].self_attn
    cache, hidden = SimpleNamespace(get_seq_length=[4, 7].__getitem__), torch.zeros(1, 3, 2)
    before = as_before(layer, {"cache": cache, "hidden_states": hidden})
    assert before["past_key_values"] is cache
    assert before["cache_position"].tolist() == [4, 5, 6]
    with pytest.raises(AttributeError):
        cache_of(SimpleNamespace())
    with pytest.raises(ValueError, match="Linear.forward takes no cache"):
        as_argument(torch.nn.Linear(1, 1), None)


def test_nothing_of_ours_uses_a_deprecated_name():
    """transformers warns once a process, so that a fresh one is asked."""
    code = (
        "import locret, torch\n"
        "from tests.tiny_models import prompt, tiny_heads, tiny_model\n"
        "from locret.model.hooks import cache_of\n"
        "model = tiny_model('llama')\n"
        "engine = locret.Engine(model, heads=tiny_heads(model), budget=20, stabilizers=3)\n"
        "output = engine.generate(prompt(150), max_new_tokens=4, return_dict_in_generate=True)\n"
        "cache_of(output)\n"
        "engine.generate(prompt(4), cache=engine.prefill(prompt(150)), max_new_tokens=4)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always::FutureWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "past_key_values" not in done.stderr, done.stderr
