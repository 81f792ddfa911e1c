"""Without a budget, an engine gives what the stock model gives; detached, nothing is left of it."""

import functools
import itertools

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import locret
from locret.model.hooks import as_argument, cache_of
from locret.policies import Policy
from tests.tiny_models import FAMILIES, PHI3_WINDOW, SLIDING, prompt, tiny_model

NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
SPOKEN = {"output_logits": True, "return_dict_in_generate": True}
LONG, SHORT = 150, 40  # one token at a time is slow: a shorter prompt for it


def full_engine(model, chunk_size=7, **settings):
    settings = {"local_tokens": 5, "longrope": "by_length"} | settings
    return locret.Engine(model, "full", budget=None, chunk_size=chunk_size, **settings)


@functools.lru_cache(maxsize=4)
def stock_answer(family, attn, length, mha=False):
    heads = {"num_key_value_heads": 8} if mha else {}
    model = tiny_model(family, attn_implementation=attn, **heads)
    return model, model.generate(prompt(length), **GREEDY, **SPOKEN)


def largest_difference(ours, stock):
    return (torch.stack(ours.logits) - torch.stack(stock.logits)).abs().max().item()


def assert_same_answer(ours, stock):
    assert torch.equal(ours.sequences, stock.sequences)
    assert largest_difference(ours, stock) < 1e-4


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES + SLIDING)
def test_greedy_answer_is_the_stock_one(family, attn):
    for chunk_size, positions in itertools.product((None, 7, 64, 1), ("compact", "original")):
        length = SHORT if chunk_size == 1 else LONG
        model, stock = stock_answer(family, attn, length)
        engine = full_engine(model, chunk_size, positions=positions)
        assert_same_answer(engine.generate(prompt(length), **GREEDY, **SPOKEN), stock)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "glm"])
def test_multi_head_attention_gives_the_stock_answer_too(family):
    model, stock = stock_answer(family, "sdpa", LONG, mha=True)
    assert_same_answer(full_engine(model, 64).generate(prompt(LONG), **GREEDY, **SPOKEN), stock)


@pytest.mark.parametrize("budget", [LONG, 10 * LONG])
def test_budget_that_holds_the_whole_prompt_gives_the_stock_answer(budget):
    model, stock = stock_answer("llama", "sdpa", LONG)
    engine = locret.Engine(
        model, "random", budget=budget, chunk_size=7, stabilizers=3, local_tokens=5
    )
    assert_same_answer(engine.generate(prompt(LONG), **GREEDY, **SPOKEN), stock)


# --- LongRoPE ---


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("length", [PHI3_WINDOW - NEW_TOKENS, PHI3_WINDOW + 1, 2 * PHI3_WINDOW])
def test_longrope_by_length_is_stock_on_both_sides_of_the_window(length, positions):
    model, stock = stock_answer("phi3", "sdpa", length)
    engine = full_engine(model, 7, positions=positions)
    assert_same_answer(engine.generate(prompt(length), **GREEDY, **SPOKEN), stock)


def test_longrope_long_is_stock_only_beyond_the_window():
    beyond, below = PHI3_WINDOW + 20, PHI3_WINDOW - NEW_TOKENS
    model, stock = stock_answer("phi3", "sdpa", beyond)
    engine = full_engine(model, 7, longrope="long")
    assert_same_answer(engine.generate(prompt(beyond), **GREEDY, **SPOKEN), stock)
    _, stock = stock_answer("phi3", "sdpa", below)
    ours = engine.generate(prompt(below), **GREEDY, **SPOKEN)
    assert (ours.logits[0] - stock.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("longrope", ["long", "by_length"])
def test_decoding_across_the_longrope_window_keeps_the_cache(longrope):
    model = tiny_model("phi3")
    engine = full_engine(model, 7, longrope=longrope)
    length = PHI3_WINDOW - 4
    ids, given = prompt(length), {"max_new_tokens": 12, "do_sample": False}
    read = []
    counting = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    output = engine.generate(ids, **given, **SPOKEN)
    counting.remove()
    assert sum(read) == length + 11  # every token but the last is read, once
    assert cache_of(output).get_seq_length() == length + 11
    # The same answer as a rotation by the same factors all along, one token more at a time.
    with engine:
        for step in range(12):
            cache = engine._reader.read(output.sequences[:, : length + step - 1], length)
            last = output.sequences[:, length + step - 1 : length + step]
            logits = model(last, **as_argument(model, cache)).logits[:, -1]
            assert (logits - output.logits[step]).abs().max() < 1e-4


# --- everything that stock generate can do ---


def assert_same_as_stock(family="llama", length=60, batch=1, seed=None, **kwargs):
    model, ids = tiny_model(family), prompt(length, batch)
    answers = []
    for generate in (model.generate, full_engine(model).generate):
        torch.manual_seed(seed or 0)
        answers.append(generate(ids, **kwargs))
    stock, ours = answers
    assert torch.equal(stock, ours)
    return stock


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("returned", [1, 3])
def test_beam_search(batch, returned):
    answer = assert_same_as_stock(
        batch=batch, num_beams=3, num_return_sequences=returned, max_new_tokens=10, do_sample=False
    )
    assert answer.shape == (batch * returned, 70)


def test_sampling_several_sequences_at_a_seed():
    answer = assert_same_as_stock(
        batch=2, seed=7, do_sample=True, num_return_sequences=3, top_k=20, max_new_tokens=10
    )
    assert len(set(map(tuple, answer.tolist()))) == 6


@pytest.mark.parametrize("length", [1, 4, 6])
def test_several_sequences_after_a_prompt_of_a_few_tokens(length):
    assert_same_as_stock(
        length=length, seed=7, do_sample=True, num_return_sequences=3, max_new_tokens=5
    )
    assert_same_as_stock(length=length, num_beams=3, max_new_tokens=5)


def test_beam_sampling():
    assert_same_as_stock(seed=3, do_sample=True, num_beams=2, max_new_tokens=10)


@pytest.mark.parametrize("family", ["llama", "phi3", "cohere", "mixtral"])
def test_rows_of_equal_length(family):
    assert_same_as_stock(family, batch=3, **GREEDY)


@pytest.mark.parametrize(
    "processors",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"min_new_tokens": 5},
        {"forced_eos_token_id": 9},
    ],
    ids=lambda processors: next(iter(processors)),
)
def test_logits_processors_see_the_whole_sequence(processors):
    assert_same_as_stock(max_new_tokens=20, do_sample=False, **processors)


def test_generation_config_object():
    config = GenerationConfig(
        max_new_tokens=6, do_sample=True, num_return_sequences=2, top_p=0.9, pad_token_id=0
    )
    answer = assert_same_as_stock(seed=5, generation_config=config)
    assert answer.shape == (2, 66)


@pytest.mark.parametrize(
    "own", [{"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str
)
def test_a_passed_configuration_leaves_the_rest_to_the_models_own(own):
    model = tiny_model("llama")
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    ids = prompt(40, batch=2)
    config = GenerationConfig(max_new_tokens=6, pad_token_id=0)
    stock = model.generate(ids, generation_config=config)
    engine = locret.Engine(model, "full", chunk_size=7, local_tokens=3)
    assert torch.equal(engine.generate(ids, generation_config=config), stock)


def test_generation_config_object_with_beams():
    config = GenerationConfig(max_new_tokens=6, num_beams=3, pad_token_id=0)
    assert_same_as_stock(generation_config=config)


def test_max_length():
    assert assert_same_as_stock(max_length=66, do_sample=False).shape[1] == 66


def test_end_of_sequence_token_ends_each_row():
    answer = assert_same_as_stock(batch=3, **GREEDY)
    eos = answer[0, 62].item()
    ended = assert_same_as_stock(batch=3, eos_token_id=eos, pad_token_id=0, **GREEDY)
    assert eos in ended[0, 60:].tolist()


class Collecting(BaseStreamer):
    def __init__(self, fail_at=None):
        self.pieces, self.ended, self.fail_at = [], False, fail_at

    def put(self, value):
        self.pieces.append(value.flatten().tolist())
        if len(self.pieces) == self.fail_at:
            raise RuntimeError("the reader has gone")

    def end(self):
        self.ended = True


def test_streamer_gets_what_stock_streams():
    model, ids = tiny_model("llama"), prompt(60)
    stock, ours = Collecting(), Collecting()
    model.generate(ids, streamer=stock, **GREEDY)
    full_engine(model).generate(ids, streamer=ours, **GREEDY)
    assert ours.pieces == stock.pieces
    assert ours.ended


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_stopping_criteria_see_the_whole_sequence():
    answer = assert_same_as_stock(
        max_new_tokens=20, do_sample=False, stopping_criteria=[StopAfter(64)]
    )
    assert answer.shape[1] == 64


def test_scores_and_hidden_states_in_the_dict():
    model, ids = tiny_model("llama"), prompt(60)
    wanted = {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True}
    stock = model.generate(ids, **GREEDY, **wanted)
    ours = full_engine(model).generate(ids, **GREEDY, **wanted)
    assert isinstance(cache_of(ours), locret.RetainedCache)
    for a, b in zip(stock.scores, ours.scores, strict=True):
        assert (a - b).abs().max() < 1e-4
    # The prompt but its local tokens was read before; from there on they are the same.
    for step, (a, b) in enumerate(zip(stock.hidden_states, ours.hidden_states, strict=True)):
        assert (a[-1][:, -1] - b[-1][:, -1]).abs().max() < 1e-4, step


# --- nothing is left on the model ---


class FailingPolicy(Policy):
    name = "failing"

    def __init__(self, layer_idx, start):
        self.at = (layer_idx, start)

    def score(self, chunk):
        if (chunk.layer_idx, chunk.start) == self.at:
            raise RuntimeError("no score")
        return chunk.key.norm(dim=-1)


def snapshot(model):
    """All that attaching could leave behind."""
    hooks = {
        name: [
            len(getattr(module, kind))
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        ]
        for name, module in model.named_modules()
    }
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    rope_types = [getattr(module, "rope_type", None) for module in model.modules()]
    return {
        "hooks": hooks,
        "attributes": attributes,
        "rope_types": rope_types,
        "config": model.config.to_dict(),
        "decoder config": model.model.config.to_dict(),
        "generation config": model.generation_config.to_dict(),
        "attention": model.config._attn_implementation,
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
    }


def assert_same_snapshot(after, before):
    for what in before:
        if what == "weights":
            for name, tensor in before[what].items():
                assert torch.equal(after[what][name], tensor), name
        else:
            assert after[what] == before[what], what


@torch.no_grad()
def behaviour(model):
    """Logits below and above the LongRoPE window, a greedy answer, and the rotary buffers."""
    logits = [model(prompt(n, seed=n)).logits for n in (30, PHI3_WINDOW + 30)]
    answer = model.generate(prompt(40), **GREEDY)
    rotary = {name: b.clone() for name, b in model.named_buffers() if "inv_freq" in name}
    return [*logits, answer, *rotary.values()]


def use_engine(model, how):
    policy = FailingPolicy(1, 28) if how == "policy fails" else "random"
    engine = locret.Engine(
        model, policy, budget=20, chunk_size=14, stabilizers=2, local_tokens=5, longrope="by_length"
    )
    ids = prompt(PHI3_WINDOW + 20)
    if how == "generate":
        engine.generate(ids, **GREEDY)
    elif how == "beams":
        engine.generate(ids, num_beams=2, **GREEDY)
    elif how == "policy fails":
        with pytest.raises(RuntimeError, match="no score"):
            engine.generate(ids, **GREEDY)
    elif how == "streamer fails":
        with pytest.raises(RuntimeError, match="the reader has gone"):
            engine.generate(ids, streamer=Collecting(fail_at=3), **GREEDY)
    elif how == "with fails":
        with pytest.raises(KeyError), engine:
            cache = engine.prefill(ids)
            model(ids[:, :3], **as_argument(model, cache))
            raise KeyError
    elif how == "closed":
        engine.__enter__()
        engine.prefill(ids)
        engine.close()
        engine.close()


@pytest.mark.parametrize(
    "how", ["generate", "beams", "policy fails", "streamer fails", "with fails", "closed"]
)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_nothing_is_left_on_the_model(family, attn, how):
    model = tiny_model(family, attn_implementation=attn)
    expected = behaviour(model)
    before = snapshot(model)
    use_engine(model, how)
    assert_same_snapshot(snapshot(model), before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for ours, stock in zip(behaviour(model), expected, strict=True):
        assert torch.equal(ours, stock)


def test_hooks_of_others_stay():
    model = tiny_model("llama")
    calls = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda module, args: calls.append("pre"))
    attention.register_forward_hook(lambda module, args, output: calls.append("post"))
    full_engine(model, None).generate(prompt(20), max_new_tokens=1)
    assert calls == ["pre", "post"] * 2
    assert len(attention._forward_pre_hooks) == len(attention._forward_hooks) == 1
