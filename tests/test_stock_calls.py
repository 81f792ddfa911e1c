"""Calls of an attached model by others than the engine: what a failure leaves of the cache."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import locret
from locret.cache.cache import RetainedCache
from locret.engine.stock_calls import check_new
from locret.model.hooks import as_argument
from locret.quantization import SCHEMES
from tests.tiny_models import prompt, tiny_model

SETTINGS = {"policy": "random", "budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
RUNS = {"group": 4, "residual": 3}
PACKING = sorted(name for name, scheme in SCHEMES.items() if scheme.packs and name != "layerquant")
CONTEXT, WHOLE = 50, 60  # tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def engine_of(model, quantization=None):
    return locret.Engine(model, quantization=quantization, **SETTINGS)


def asked(model, cache, ids=None):
    """What stock `generate` answers."""
    ids = prompt(WHOLE) if ids is None else ids
    return model.generate(ids, **as_argument(model, cache, "generate"), **GREEDY)


@contextlib.contextmanager
def failing(module, change, after=0):
    """While it is entered, `change` is called with what `module` gives, after so many calls."""
    calls = []

    def hook(*given):
        calls.append(given)
        return change(given[-1]) if len(calls) > after else None

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def interrupt(output):
    raise KeyboardInterrupt


def run_out(output):
    raise torch.OutOfMemoryError


def parts_of(model):
    """Modules whose calls come before, between and after what a layer stores."""
    first, last = model.model.layers
    inside = [first.self_attn.q_proj, first.mlp, last.self_attn.v_proj, last.mlp, model.model.norm]
    return [*inside, model.lm_head]


def held(cache):
    """What a cache holds, for comparison."""
    layers = [
        [layer.seen, layer.rotated, layer.lengths, layer.keys, layer.values, *layer.state.values()]
        for layer in cache.layers
    ]
    return cache.answered, cache.token_ids.tolist(), layers


def assert_as_before(cache, before):
    torch.testing.assert_close(held(cache), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 2.0**20])
def test_what_cannot_be_packed_leaves_the_cache_as_it_was(model, name, bad):
    engine = engine_of(model, {"name": name} | RUNS)
    expected = engine.generate(
        prompt(WHOLE)[:, CONTEXT:], cache=engine.prefill(prompt(WHOLE)[:, :CONTEXT]), **GREEDY
    )
    with engine:
        cache = engine.prefill(prompt(WHOLE)[:, :CONTEXT])
        before = held(cache)
        values = model.model.layers[1].self_attn.v_proj
        with (
            failing(values, lambda output: output * bad),
            pytest.raises(ValueError, match="cannot quantize"),
        ):
            asked(model, cache)
        assert_as_before(cache, before)
        assert torch.equal(asked(model, cache)[:, CONTEXT:], expected)


@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("after", [0, 3])
def test_a_call_that_fails_leaves_the_cache_as_it_was(model, part, after):
    engine = engine_of(model)
    with engine:
        cache = engine.prefill(prompt(WHOLE)[:, :CONTEXT])
        before = held(cache)
        with (
            failing(parts_of(model)[part], run_out, after),
            pytest.raises(torch.OutOfMemoryError),
        ):
            asked(model, cache)
        # One call reads the question, and each of the others a token.
        read = CONTEXT if not after else WHOLE + after - 1
        assert {layer.seen for layer in cache.layers} == {read}
        if not after:
            assert_as_before(cache, before)


@pytest.mark.parametrize("part", range(6))
def test_a_step_that_failed_can_be_taken_again(model, part):
    engine, ids = engine_of(model), prompt(WHOLE)
    with engine, torch.no_grad():
        cache = engine.prefill(ids[:, :CONTEXT])
        untouched = cache.fork()
        for at in range(CONTEXT, WHOLE, 2):
            step = ids[:, at : at + 2]
            with failing(parts_of(model)[part], run_out), pytest.raises(torch.OutOfMemoryError):
                model(step, **as_argument(model, cache))
            given = model(step, **as_argument(model, cache)).logits
            assert torch.equal(given, model(step, **as_argument(model, untouched)).logits)


@pytest.mark.parametrize("part", range(6))
def test_an_interrupt_leaves_the_cache_as_it_was(model, part):
    engine = engine_of(model)
    cache = engine.prefill(prompt(WHOLE)[:, :CONTEXT])
    before = held(cache)
    with pytest.raises(KeyboardInterrupt), engine, failing(parts_of(model)[part], interrupt):
        asked(model, cache)
    assert_as_before(cache, before)


@pytest.mark.parametrize("part", range(6))
def test_an_interrupt_within_the_block_is_made_good_by_the_next_call(model, part):
    engine, ids = engine_of(model), prompt(WHOLE)
    with engine, torch.no_grad():
        cache = engine.prefill(ids[:, :CONTEXT])
        untouched = cache.fork()
        with failing(parts_of(model)[part], interrupt), pytest.raises(KeyboardInterrupt):
            model(ids[:, CONTEXT:], **as_argument(model, cache))
        given = model(ids[:, CONTEXT:], **as_argument(model, cache)).logits
        assert torch.equal(given, model(ids[:, CONTEXT:], **as_argument(model, untouched)).logits)


@pytest.mark.parametrize("part", range(6))
def test_what_is_done_with_the_cache_after_an_interrupt_stays(model, part):
    engine, question = engine_of(model), prompt(WHOLE)[:, CONTEXT:]
    expected = engine.generate(question, cache=engine.prefill(prompt(CONTEXT)), **GREEDY)
    with engine:
        cache = engine.prefill(prompt(CONTEXT))
        untouched = cache.snapshot()
        with failing(parts_of(model)[part], interrupt, 3), pytest.raises(KeyboardInterrupt):
            asked(model, cache)
        cache.restore(untouched)
        before = held(cache)
    assert_as_before(cache, before)
    with engine:
        with failing(parts_of(model)[part], interrupt), pytest.raises(KeyboardInterrupt):
            asked(model, cache)
        assert torch.equal(engine.generate(question, cache=cache, **GREEDY), expected)


@pytest.mark.parametrize("part", range(6))
def test_a_decoder_called_by_itself_leaves_the_cache_as_it_was(model, part):
    engine, ids = engine_of(model), prompt(WHOLE)
    decoder = model.model
    with engine, torch.no_grad():
        cache = engine.prefill(ids[:, :CONTEXT])
        before = held(cache)
        with failing(parts_of(model)[part], interrupt), pytest.raises(KeyboardInterrupt):
            model(ids[:, CONTEXT:], **as_argument(model, cache))
        for _ in range(2):
            with failing(decoder.norm, run_out), pytest.raises(torch.OutOfMemoryError):
                decoder(ids[:, CONTEXT:], **as_argument(decoder, cache))
            assert_as_before(cache, before)
        decoder(ids[:, CONTEXT:], **as_argument(decoder, cache))
    assert cache.seen == WHOLE


def test_rows_of_different_lengths_are_as_they_were_too(model):
    engine, ids = engine_of(model, {"name": "kivi"} | RUNS), prompt(CONTEXT, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with engine, torch.no_grad():
        cache = engine.prefill(ids, mask)
        before = held(cache)
        keys = model.model.layers[1].self_attn.k_proj
        with failing(keys, lambda output: output * torch.nan), pytest.raises(ValueError):
            model(prompt(9, batch=2), **as_argument(model, cache))
        assert_as_before(cache, before)
        model(prompt(9, batch=2), **as_argument(model, cache))


@pytest.mark.parametrize("after", [3, None])
def test_a_sequence_that_the_cache_is_ahead_of_is_not_answered(model, after):
    engine = engine_of(model)
    with engine:
        cache = engine.prefill(prompt(WHOLE)[:, :CONTEXT])
        untouched = cache.snapshot()
        expected = asked(model, cache)
        if after is not None:
            cache.restore(untouched)
            stops = (pytest.raises(torch.OutOfMemoryError), failing(model.lm_head, run_out, after))
            with stops[0], stops[1]:
                asked(model, cache)
        before = held(cache)
        with pytest.raises(ValueError, match=r"tokens given are not those that follow: .*snapshot"):
            asked(model, cache)
        assert_as_before(cache, before)
        with pytest.raises(ValueError, match="no token follows"):
            asked(model, cache, prompt(5))
        cache.restore(untouched)
        assert torch.equal(asked(model, cache), expected)


@pytest.mark.parametrize("length", [33, 34, 35, 59, 60, 61, 67])
def test_a_shorter_sequence_is_not_answered(model, length):
    engine = engine_of(model)
    with engine:
        cache = engine.prefill(prompt(WHOLE)[:, :CONTEXT])
        asked(model, cache)
        before = held(cache)
        assert cache.seen == 67
        with pytest.raises(ValueError, match=r"has seen 67 tokens, and .* follow"):
            asked(model, cache, prompt(length))
        assert_as_before(cache, before)


@pytest.mark.parametrize("context", [1, 2, 3, 4, 5, 50])
@pytest.mark.parametrize("rows", [1, 2])
def test_no_sequence_that_is_not_ahead_of_the_cache_is_answered(model, context, rows):
    """Of one half as long as the cache, stock `generate` takes a single token for new."""
    engine, ids = engine_of(model), prompt(context + 1, batch=rows)
    with engine:
        cache = engine.prefill(ids[:, :context])
        before = held(cache)
        for length in range(1, context + 1):
            with pytest.raises(ValueError, match=rf"has seen {context} tokens, and .* follow"):
                asked(model, cache, ids[:, :length])
            assert_as_before(cache, before)
        assert asked(model, cache, ids).shape == (rows, context + 1 + 8)


def test_no_step_is_waited_for_on_a_device():
    """A step is looked at by shapes alone: tensors on the meta device have no values."""
    cache = RetainedCache(2)
    cache.layers[0].seen = 67
    inputs = {
        "input_ids": torch.empty(1, 1, dtype=torch.long, device="meta"),
        "position_ids": torch.empty(1, 1, dtype=torch.long, device="meta"),
        "attention_mask": torch.empty(1, 68, dtype=torch.long, device="meta"),
    }
    check_new(cache, (), inputs)
    inputs["attention_mask"] = inputs["attention_mask"][:, :34]
    with pytest.raises(ValueError, match="attention_mask is of 34 tokens, not 68"):
        check_new(cache, (), inputs)


@pytest.mark.parametrize("given", [{"position_ids": [[7]]}, {"attention_mask": [[1]]}], ids=str)
def test_a_token_that_says_where_it_is_from_is_checked(model, given):
    engine, ids = engine_of(model), prompt(CONTEXT + 1)
    given = {name: torch.tensor(value) for name, value in given.items()}
    with engine, torch.no_grad():
        cache = engine.prefill(ids[:, :CONTEXT])
        before = held(cache)
        with pytest.raises(ValueError, match="given is not the one that follows"):
            model(ids[:, CONTEXT:], **given, **as_argument(model, cache))
        assert_as_before(cache, before)


@pytest.mark.parametrize(("rows", "given"), [(1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("embedded", [True, False])
def test_other_numbers_of_rows_are_not_answered(model, rows, given, embedded):
    engine, ids = engine_of(model), prompt(WHOLE, batch=given)[:, CONTEXT:]
    inputs = {"inputs_embeds": model.model.embed_tokens(ids)} if embedded else {"input_ids": ids}
    with engine, torch.no_grad():
        cache = engine.prefill(prompt(CONTEXT, batch=rows))
        before = held(cache)
        with pytest.raises(ValueError, match=f"holds {rows} rows, and {given} are given"):
            model(**inputs, **as_argument(model, cache))
        assert_as_before(cache, before)


def test_beams_need_rows_of_their_own(model):
    engine, ids = engine_of(model), prompt(WHOLE)
    with engine:
        cache = engine.prefill(ids[:, :CONTEXT])
        given = as_argument(model, cache, "generate")
        with pytest.raises(ValueError, match="batch_repeat_interleave"):
            model.generate(ids, **given, num_beams=3, **GREEDY)
        cache.batch_repeat_interleave(3)
        assert model.generate(ids, **given, num_beams=3, **GREEDY).shape == (1, WHOLE + 8)


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_decoding_that_gives_tokens_again_is_refused(model, settings):
    engine = engine_of(model)
    with engine, pytest.raises(ValueError, match=r"position_ids end at .* cannot draft tokens"):
        cache = engine.prefill(prompt(WHOLE)[:, :CONTEXT])
        given = as_argument(model, cache, "generate")
        model.generate(prompt(WHOLE), **given, **settings, **GREEDY)


def test_rows_that_the_cache_is_ahead_of_are_not_answered(model):
    engine, ids = engine_of(model), prompt(WHOLE, batch=2)
    mask = torch.ones_like(ids[:, :CONTEXT])
    mask[0, :9] = 0
    with engine:
        cache = engine.prefill(ids[:, :CONTEXT], mask)
        assert asked(model, cache, ids).shape == (2, WHOLE + 8)
        with pytest.raises(ValueError, match="tokens given are not those that follow"):
            asked(model, cache, ids)


def test_calls_of_two_threads_leave_each_others_caches_alone(model):
    engine, ids, barrier = engine_of(model), prompt(WHOLE), threading.Barrier(2, timeout=60)

    def meet(output):  # within a layer, when both have begun a call
        barrier.wait()

    def answer(cache):
        with torch.no_grad():
            return asked(model, cache)

    with engine:
        expected = asked(model, engine.prefill(ids[:, :CONTEXT]))
        caches = [engine.prefill(ids[:, :CONTEXT]) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool, failing(model.model.layers[0].mlp, meet):
            answers = [*pool.map(answer, caches)]
    assert all(torch.equal(each, expected) for each in answers)


def test_a_block_that_reads_into_a_cache_and_fails_leaves_it_as_it_was(model):
    engine = engine_of(model)
    cache, counts = engine.new_cache(CONTEXT)
    with (
        torch.no_grad(),
        pytest.raises(torch.OutOfMemoryError),
        engine,
        engine.reading_into(cache, counts),
    ):
        model(prompt(30), **as_argument(model, cache))
        with failing(model.model.layers[0].mlp, run_out):
            model(prompt(20), **as_argument(model, cache))
    assert cache.seen == 0
    assert all(layer.is_empty for layer in cache.layers)


def test_nothing_is_left_of_the_hooks(model):
    engine = engine_of(model)
    with engine:
        assert model.model._forward_pre_hooks
    for module in (model, model.model):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._forward_hooks_always_called
