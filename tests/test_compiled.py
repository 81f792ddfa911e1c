"""Models compiled by `torch.compile`, in every way there is, answer through an engine as uncompiled
ones do, and are as compiled afterwards as before."""

import threading

import pytest
import torch
from torch._dynamo import eval_frame
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

import locret
from locret.model.backbone import Backbone
from locret.model.hooks import RunningUncompiled, as_argument
from locret.policies import Policy
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.tiny_models import prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture
def counter():
    """A backend that compiles nothing and counts what it is given."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def plain():
    return tiny_model("llama")


def engine_of(model, policy="random", **settings):
    return locret.Engine(model, policy, **SMALL | settings)


def compiled_forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


def wrapped(model, backend):
    return torch.compile(model, backend=backend)


def decoder_in_place(model, backend):
    model.model.compile(backend=backend)
    return model


def decoder_wrapped(model, backend):
    model.model = torch.compile(model.model, backend=backend)
    return model


def layers_in_place(model, backend):
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def layers_wrapped(model, backend):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend=backend)
    return model


def layers_by_their_forward(model, backend):
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
    return model


def attention_in_place(model, backend):
    for layer in model.model.layers:
        layer.self_attn.compile(backend=backend)
    return model


def attention_wrapped(model, backend):
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend=backend)
    return model


WAYS = [
    compiled_forward,
    compiled_in_place,
    wrapped,
    decoder_in_place,
    decoder_wrapped,
    layers_in_place,
    layers_wrapped,
    layers_by_their_forward,
    attention_in_place,
    attention_wrapped,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_compiled_models_answer_as_others_and_stay_compiled(plain, counter, way):
    ids, question = prompt(40), prompt(4, seed=5)
    reference = engine_of(plain)
    expected = reference.generate(ids, **GREEDY)
    turn = reference.generate(question, cache=reference.prefill(ids), **GREEDY)

    model = way(tiny_model("llama"), counter)
    with torch.no_grad():
        before = model(ids).logits  # a wrapped model is compiled where it is called itself
    stock = model.generate(ids, **GREEDY)
    compiled = counter.frame_count
    assert compiled
    engine = engine_of(model)
    for _ in range(2):
        assert torch.equal(engine.generate(ids, **GREEDY), expected)
    assert torch.equal(engine.generate(question, cache=engine.prefill(ids), **GREEDY), turn)
    assert torch.equal(model.generate(ids, **GREEDY), stock)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert counter.frame_count == compiled  # what was compiled serves again, and nothing is new


def test_compiled_after_the_engine_was_made(plain, counter):
    model = tiny_model("llama")
    engine = engine_of(model)
    decoder_wrapped(layers_in_place(model, counter), counter)
    model.generate(prompt(40), **GREEDY)
    expected = engine_of(plain).generate(prompt(40), **GREEDY)
    assert torch.equal(engine.generate(prompt(40), **GREEDY), expected)


def test_stock_generate_of_a_compiled_model_within_the_block(plain, counter):
    ids = prompt(40)
    model = compiled_in_place(tiny_model("llama"), counter)
    model.generate(ids, **GREEDY)
    reference = engine_of(plain)
    expected = reference.generate(ids[:, 30:], cache=reference.prefill(ids[:, :30]), **GREEDY)
    with engine_of(model) as engine:
        cache = engine.prefill(ids[:, :30])
        answer = model.generate(ids, **as_argument(model, cache, "generate"), **GREEDY)
    assert torch.equal(answer[:, 30:], expected)


def test_stock_generate_still_compiles_for_a_static_cache(counter):
    model, ids = tiny_model("llama"), prompt(40)

    def backend(graph, inputs):  # configurations are copied, functions in them are not
        return counter(graph, inputs)

    config = CompileConfig(backend=backend, mode=None, fullgraph=False)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    stock = model.generate(ids, **static, **GREEDY)
    compiled = counter.frame_count
    assert compiled
    expected = engine_of(tiny_model("llama")).generate(ids, **GREEDY)
    assert torch.equal(engine_of(model).generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, **static, **GREEDY), stock)
    assert counter.frame_count == compiled


def test_engine_called_by_a_compiled_function(plain, counter):
    expected = engine_of(plain).generate(prompt(40), **GREEDY)
    for model in (tiny_model("llama"), compiled_in_place(tiny_model("llama"), counter)):
        engine = engine_of(model)

        def answer(ids, engine=engine):
            return engine.generate(ids + 0, cache=None, **GREEDY)

        assert torch.equal(torch.compile(answer, backend=counter)(prompt(40)), expected)


def test_what_no_attention_is_in_stays_compiled_while_attached(counter):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.compile(backend=counter)
    engine_of(model).generate(prompt(40), **GREEDY)
    assert counter.frame_count


@pytest.mark.parametrize("stance", ["default", "eager_on_recompile"])
def test_the_stance_comes_back_after_an_exception_too(counter, stance):
    class Broken(Policy):
        name = "broken"

        def score(self, chunk):
            raise OSError

    model = compiled_in_place(tiny_model("llama"), counter)
    with torch.compiler.set_stance(stance):
        with pytest.raises(OSError):
            engine_of(model, Broken()).prefill(prompt(40))
        assert eval_frame._stance.stance == stance


def test_threads_may_leave_in_any_order():
    shared, entered, leave = RunningUncompiled(), threading.Event(), threading.Event()

    def stay():
        with shared:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    with shared:
        thread.start()
        entered.wait()
    assert eval_frame._stance.stance == "force_eager"  # the other one is still inside
    leave.set()
    thread.join()
    assert eval_frame._stance.stance == "default"


@pytest.mark.parametrize("way", [wrapped, decoder_wrapped], ids=lambda way: way.__name__)
def test_contexts_of_a_compiled_model_and_of_its_original_are_the_same(counter, way, tmp_path):
    model = tiny_model("llama")
    engine_of(model).prefill(prompt(40)).save(tmp_path / "context")
    compiled = way(tiny_model("llama"), counter)
    loaded = locret.RetainedCache.load(tmp_path / "context", compiled)
    given = engine_of(compiled).generate(prompt(3, seed=1), cache=loaded, **GREEDY)
    expected = engine_of(model).prefill(prompt(40))
    assert torch.equal(
        given, engine_of(model).generate(prompt(3, seed=1), cache=expected, **GREEDY)
    )


def test_heads_learn_from_a_compiled_model(plain, counter):
    losses = []
    for model in (plain, decoder_in_place(tiny_model("llama"), counter)):
        heads = tiny_heads(plain).requires_grad_(True)
        learn = Distillation(Backbone(model), heads)
        losses.append(learn(prompt(40), [Segment.single(30, 40)]).loss.item())
    assert losses[0] == losses[1]
