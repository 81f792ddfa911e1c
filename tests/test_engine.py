"""The engine: its settings, its requests, its turns, and what the policies keep."""

import copy
import random

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import locret
from locret.engine.chunk_size import ON_CPU
from locret.engine.config import PAPER
from locret.engine.engine import DEFAULT_NEW_TOKENS
from locret.heads.heads import FEATURES
from locret.model.backbone import Backbone
from locret.model.hooks import as_argument, cache_of
from locret.policies import POLICIES, LocretPolicy, Policy
from tests.kept import kept, stacked
from tests.test_batches import padded
from tests.tiny_models import distinct_prompt, prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=512)


@pytest.fixture(scope="module")
def heads(model):
    return tiny_heads(model)


def small_engine(model, policy="random", **settings):
    return locret.Engine(model, policy, **SMALL | settings)


def full_engine(model, **settings):
    return small_engine(model, "full", **settings)


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget is 0; expected at least 1, or None"),
        ({"budget": -5}, "budget is -5"),
        ({"budget": []}, "one whole number of at least 1 for each layer"),
        ({"budget": [9, "9"]}, "one whole number of at least 1 for each layer"),
        ({"budget": [9]}, "one whole number of at least 1 for each of the 2 layers"),
        ({"budget": "auto", "budget_bytes": 1.5}, "budget_bytes is 1.5"),
        ({"quantization": {"name": "kivi", "bits": 4.0}}, "bits is 4.0; kivi takes"),
        ({"chunk_size": 0}, "chunk_size is 0; expected a whole number of at least 1"),
        ({"local_tokens": 0}, "local_tokens is 0; expected a whole number of at least 1"),
        ({"local_tokens": None}, "local_tokens is None; expected a whole number of at least 1"),
        ({"chunk_size": "7"}, "chunk_size is '7'; .*; give a number, 7, not a text"),
        ({"stabilizers": None}, "stabilizers is None; expected a whole number of at least 0"),
        ({"decode_interval": 1.5}, "decode_interval is 1.5; expected a whole number of at least 1"),
        ({"quantization": {"name": "kivi", "group": "64"}}, "group is '64'; expected a whole"),
        ({"stabilizers": -1}, "stabilizers is -1; expected a whole number of at least 0"),
        ({"stabilizers": 21}, "lower stabilizers or raise the budget"),
        ({"positions": "rotated"}, "expected 'compact' or 'original'"),
        ({"longrope": "short"}, "expected 'long' or 'by_length'"),
        ({"policy": "best"}, "'best' is unknown; expected a Policy, or one of .*streaming_llm"),
        ({"policy": "locret"}, "needs trained heads: pass heads="),
        ({"policy": "locret", "heads": "a/folder"}, "heads is 'a/folder'; .*from_pretrained"),
        ({"policy": POLICIES["full"]}, "is unknown"),
        ({"policy": None}, "policy is None; expected a Policy, or one of"),
        ({"budget": np.array([9, 9])}, r"budget is array\(\[9, 9\]\); expected units"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_at_once(model, settings, message):
    with pytest.raises(ValueError, match=message):
        small_engine(model, **settings)


def test_streaming_llm_refuses_negative_sinks():
    with pytest.raises(ValueError, match="sinks is -1"):
        POLICIES["streaming_llm"](sinks=-1)


def test_without_heads_the_settings_are_the_papers(model):
    engine = locret.Engine(model, "random")
    ours = {name: getattr(engine.config.reading, name) for name in PAPER}
    assert ours == PAPER and engine.config.reading.chunk_size == ON_CPU
    assert engine.config.reading.positions == "compact"


RECORDED = {"budget": 60, "chunk_size": 9, "stabilizers": 12, "local_tokens": 4}


def recorded_heads(model, **record):
    return tiny_heads(model, **{"defaults": RECORDED} | record)


def test_settings_come_from_the_heads_record(model):
    heads = recorded_heads(model, positions="original")
    engine = locret.Engine(model, heads=heads)
    assert {name: getattr(engine.config.reading, name) for name in RECORDED} == RECORDED
    assert engine.config.reading.positions == "original"
    phi3 = tiny_model("phi3")
    for rule in ("long", "by_length"):
        assert (
            locret.Engine(phi3, heads=recorded_heads(phi3, longrope=rule)).backbone.longrope == rule
        )


def test_settings_given_win_over_the_record(model):
    heads = recorded_heads(model, positions="original")
    engine = locret.Engine(model, heads=heads, positions="compact", **SMALL)
    assert {name: getattr(engine.config.reading, name) for name in SMALL} == SMALL
    assert engine.config.reading.positions == "compact"


def test_record_of_some_settings_leaves_the_papers_for_the_others(model):
    engine = locret.Engine(model, heads=recorded_heads(model, defaults={"budget": 4096}))
    reading = engine.config.reading
    assert (reading.budget, reading.chunk_size) == (4096, ON_CPU)
    assert reading.stabilizers == PAPER["stabilizers"] // 4  # in proportion to the budget
    engine = locret.Engine(model, heads=recorded_heads(model, defaults={"chunk_size": 9}))
    reading = engine.config.reading
    assert reading.chunk_size == 9
    assert (reading.budget, reading.stabilizers) == (PAPER["budget"], PAPER["stabilizers"])


@pytest.mark.parametrize(("budget", "stabilizers"), [(30, 6), (5, 1), (4, 0), (60, 12)])
def test_smaller_budget_keeps_the_recorded_proportion_of_stabilizers(model, budget, stabilizers):
    engine = locret.Engine(model, heads=recorded_heads(model), budget=budget)
    assert engine.config.reading.stabilizers == stabilizers


def test_record_serves_other_policies_too(model):
    engine = locret.Engine(model, "random", heads=recorded_heads(model))
    assert engine.config.reading.budget == RECORDED["budget"]
    assert engine.policy.name == "random"


def test_no_budget_needs_no_stabilizers(model):
    engine = locret.Engine(model, "random", budget=None, local_tokens=3)
    assert engine.config.reading.budget is None


def test_heads_of_another_backbone_are_refused_with_the_difference(model):
    others = tiny_heads(tiny_model("llama", num_hidden_layers=3), backbone="some/other")
    with pytest.raises(ValueError, match=r"some/other.*num_layers: heads 3, backbone 2"):
        small_engine(model, "locret", heads=others)
    wide = tiny_heads(tiny_model("llama", num_key_value_heads=4))
    with pytest.raises(ValueError, match="num_kv_heads: heads 4, backbone 2"):
        small_engine(model, "random", heads=wide)
    gelu = tiny_heads(tiny_model("llama", hidden_act="gelu"))
    with pytest.raises(ValueError, match="activation: heads 'gelu', backbone 'silu'"):
        small_engine(model, "locret", heads=gelu)


def test_heads_of_another_backbone_inside_a_policy_are_refused_too(model):
    wide = tiny_heads(tiny_model("llama", num_key_value_heads=4), backbone="some/other")
    with pytest.raises(ValueError, match="some/other.*num_kv_heads: heads 4, backbone 2"):
        small_engine(model, LocretPolicy(wide))
    with pytest.raises(ValueError, match="num_kv_heads: heads 4, backbone 2"):
        small_engine(model, LocretPolicy(tiny_heads(model)), heads=wide)


def test_policy_object_is_used_as_it_is(model, heads):
    policy = LocretPolicy(heads)
    assert small_engine(model, policy).policy is policy


# --- dtypes ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_in_half_precision_takes_float32_heads(heads, dtype):
    half = tiny_model("llama", vocab_size=512).to(dtype)
    before = copy.deepcopy(heads.state_dict())
    engine = small_engine(half, "locret", heads=heads, decode_interval=8)
    cache = engine.prefill(prompt(60))
    assert cache.layers[0].keys.dtype == dtype
    assert cache.layers[0].scores[0][0].dtype == torch.float32
    assert engine.generate(prompt(60), **GREEDY).shape == (1, 68)
    assert engine.policy.heads[0].fc1.weight.dtype == dtype
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float32


def test_heads_of_two_dtypes_are_brought_to_one(model, heads):
    mixed = copy.deepcopy(heads)
    for layer in mixed.layers:
        layer.fc2.to(torch.bfloat16)
    assert small_engine(model, "locret", heads=mixed).generate(prompt(60), **GREEDY).numel() == 68


# --- requests ---


def test_requests_do_not_see_each_other(model, heads):
    prompts = [prompt(60, seed=1), prompt(45, seed=2), prompt(3, seed=3), prompt(60, 2, seed=4)]
    fresh = [small_engine(model, "locret", heads=heads).generate(ids, **GREEDY) for ids in prompts]
    engine = small_engine(model, "locret", heads=heads)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        for which in order:
            assert torch.equal(engine.generate(prompts[which], **GREEDY), fresh[which])


def test_rows_of_a_batch_do_not_see_each_other(model, heads):
    ids = prompt(60, batch=3)
    engine = small_engine(model, "locret", heads=heads)
    together = engine.generate(ids, **GREEDY)
    for row in range(3):
        assert torch.equal(engine.generate(ids[row : row + 1], **GREEDY)[0], together[row])


def test_two_caches_can_be_read_in_turns(model, heads):
    engine = small_engine(model, "locret", heads=heads)
    contexts, question = [prompt(50, seed=1), prompt(64, seed=2)], prompt(6, seed=3)
    alone = [engine.generate(question, cache=engine.prefill(ids), **GREEDY) for ids in contexts]
    caches = [engine.prefill(ids) for ids in contexts]
    for cache, answer in reversed(list(zip(caches, alone, strict=True))):
        assert torch.equal(engine.generate(question, cache=cache, **GREEDY), answer)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 12, 13])
def test_prompts_about_as_long_as_the_local_tokens(model, length):
    ids = prompt(length)
    stock = model.generate(ids, **GREEDY)
    assert torch.equal(full_engine(model).generate(ids, **GREEDY), stock)
    assert torch.equal(small_engine(model).generate(ids, **GREEDY), stock)


def test_prompt_within_the_budget_loses_nothing(model):
    ids = prompt(18)
    cache = small_engine(model, chunk_size=100).prefill(ids)
    assert kept(cache) == list(range(18))
    assert torch.equal(small_engine(model).generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_budget_of_one(model):
    engine = small_engine(model, budget=1, stabilizers=0)
    assert engine.prefill(prompt(50)).report()["units"] == [1, 1]
    assert engine.generate(prompt(50), **GREEDY).shape == (1, 58)


def test_last_eviction_protects_nothing_and_earlier_ones_the_stabilizers(model):
    class First(Policy):
        name = "first"

        def score(self, chunk):
            scores = -torch.arange(chunk.start, chunk.start + chunk.key.shape[2]).float()
            return scores.expand(chunk.key.shape[:3])

    cache = small_engine(model, First()).prefill(prompt(42))
    # The eviction before the last kept its stabilizers, the newest units then; the last one did
    # not favour the newest of all.
    assert kept(cache) == [*range(17), 32, 33, 34]


def test_progress_is_told_of_every_chunk(model):
    calls = []
    engine = small_engine(model, progress=lambda done, total: calls.append((done, total)))
    engine.prefill(prompt(17))
    assert calls == [(7, 17), (14, 17), (17, 17)]
    calls.clear()
    engine.generate(prompt(17), **GREEDY)
    assert calls == [(7, 12), (12, 12)]


def test_chunk_size_none_reads_all_at_once(model):
    calls = []
    engine = small_engine(model, chunk_size=None, progress=lambda *done: calls.append(done))
    assert engine.prefill(prompt(50)).report()["units"] == [20, 20]
    assert calls == [(50, 50)]


def test_answer_is_64_tokens_unless_something_says_otherwise(model):
    ids, engine = prompt(10), small_engine(model)

    def answered(**kwargs):
        return engine.generate(ids, **kwargs).shape[1] - 10

    assert answered() == answered(generation_config=None) == DEFAULT_NEW_TOKENS == 64
    assert answered(max_length=13) == 3
    assert answered(generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=0)) == 2
    config = GenerationConfig(max_new_tokens=9, pad_token_id=0)
    assert answered(generation_config=config, max_new_tokens=4) == 4
    with pytest.raises(ValueError, match="must be greater than 0"):
        answered(max_new_tokens=0)


def test_sampling_is_reproducible(model):
    engine = small_engine(model)

    def sampled(seed):
        torch.manual_seed(seed)
        return engine.generate(prompt(60), do_sample=True, max_new_tokens=12).tolist()

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize("where", ["generation config", "generation_config argument"])
def test_use_cache_false_in_a_configuration_does_not_bypass_the_cache(where):
    model = tiny_model("llama")
    expected = small_engine(model).generate(prompt(60), **GREEDY)
    kwargs = {}
    if where == "generation config":
        model.generation_config.use_cache = False
    else:
        kwargs["generation_config"] = GenerationConfig(use_cache=False, pad_token_id=0)
    assert torch.equal(small_engine(model).generate(prompt(60), **GREEDY, **kwargs), expected)


# --- what is refused ---


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.ones(1, 0, dtype=torch.long), None, "at least one token"),
        (torch.ones(5, dtype=torch.long), None, r"shape \(5,\); expected \[batch, tokens\]"),
        (prompt(4), torch.tensor([[0, 1, 0, 1]]), "pad prompts on the left"),
        (prompt(4), torch.zeros(1, 4), "or nothing else in a row"),
        (prompt(4), [[1, 1, 1, 1]], "attention_mask is a list; expected a tensor"),
        (prompt(4, 2), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), "pad prompts on the left"),
        (prompt(4), torch.ones(1, 5), r"shape \(1, 5\); expected that of input_ids"),
        (prompt(4), torch.ones(2, 4), "expected that of input_ids"),
    ],
)
def test_input_that_is_refused(model, ids, mask, message):
    engine = small_engine(model)
    for call in (engine.prefill, engine.generate):
        with pytest.raises(ValueError, match=message):
            call(ids, attention_mask=mask)


def test_mask_of_ones_is_welcome(model):
    engine, ids = small_engine(model), prompt(40)
    expected = engine.generate(ids, **GREEDY)
    for mask in (torch.ones_like(ids), torch.ones(1, 40, dtype=torch.bool)):
        assert torch.equal(engine.generate(ids, attention_mask=mask, **GREEDY), expected)
    cache = engine.prefill(ids[:, :30])
    engine.generate(ids[:, 30:], attention_mask=torch.ones_like(ids), cache=cache, **GREEDY)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"adapter_names": ["default"]},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": object()},
        {"cache_implementation": "static"},
        {"inputs_embeds": torch.zeros(1, 4, 64)},
        {"guidance_scale": 1.5},
        {"use_cache": False},
        {"past_key_values": DynamicCache()},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3, pad_token_id=0)},
        {"generation_config": GenerationConfig(cache_implementation="static", pad_token_id=0)},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_decoding_that_brings_its_own_cache_is_refused(model, kwargs):
    engine = small_engine(model)
    with pytest.raises(ValueError, match=r"leave it out|rolled back|cache=|unsupported"):
        engine.generate(prompt(30), **kwargs)
    assert engine.generate(prompt(30), **GREEDY).shape == (1, 38)


def test_gradient_checkpointing_in_training_mode_answers_as_without_or_is_refused():
    expected = small_engine(tiny_model("llama")).generate(prompt(30), **GREEDY)
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    engine = small_engine(model)
    if "cache" in as_argument(model, None):  # from 5.24 on a cache is kept where no gradients are
        assert torch.equal(engine.generate(prompt(30), **GREEDY), expected)
        cache = engine.prefill(prompt(30))
    else:
        with pytest.raises(ValueError, match="turn gradient checkpointing off or call model.eval"):
            engine.prefill(prompt(30))
        cache = engine.new_cache(30)[0]
    with engine, pytest.raises(ValueError, match="turn gradient checkpointing off or call"):
        model(prompt(3), **as_argument(model, cache))  # with gradients
    model.eval()
    assert torch.equal(engine.generate(prompt(30), **GREEDY), expected)


# --- attaching ---


def test_second_engine_on_an_attached_model_is_refused(model):
    first, second = small_engine(model), small_engine(model)
    with first:
        with pytest.raises(ValueError, match=r"already has an engine attached; leave its `with`"):
            second.prefill(prompt(10))
        assert first.prefill(prompt(10)).seen == 10
    assert second.prefill(prompt(10)).seen == 10


def test_engines_may_take_turns(model, heads):
    first, second = small_engine(model, "locret", heads=heads), full_engine(model)
    expected = [first.generate(prompt(60), **GREEDY), second.generate(prompt(60), **GREEDY)]
    for _ in range(2):
        assert torch.equal(first.generate(prompt(60), **GREEDY), expected[0])
        assert torch.equal(second.generate(prompt(60), **GREEDY), expected[1])


def test_blocks_nest_and_detach_at_the_outermost(model):
    engine = small_engine(model)
    with engine:
        with engine:
            engine.prefill(prompt(10))
        assert engine.prefill(prompt(10)).seen == 10
        assert model.config._attn_implementation == "locret"
    assert model.config._attn_implementation == "sdpa"


def test_close_within_a_block_leaves_a_usable_engine(model):
    engine = small_engine(model)
    with engine, engine:
        engine.close()
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"
    for _ in range(2):
        assert engine.generate(prompt(30), **GREEDY).shape == (1, 38)
    with engine:
        assert model.config._attn_implementation == "locret"
    assert model.config._attn_implementation == "sdpa"


def test_engine_survives_an_exception(model):
    class Broken(Policy):
        name = "broken"

        def score(self, chunk):
            raise OSError

    engine = small_engine(model, Broken())
    for _ in range(2):
        with pytest.raises(OSError):
            engine.prefill(prompt(30))
    with pytest.raises(NotImplementedError, match="Policy must implement score"):
        small_engine(model, Policy()).prefill(prompt(30))


def test_stock_generate_goes_on_from_a_cache_within_the_block(model, heads):
    engine = small_engine(model, "locret", heads=heads)
    ids = prompt(60)
    expected = engine.generate(ids[:, 50:], cache=engine.prefill(ids[:, :50]), **GREEDY)
    with engine:
        cache = engine.prefill(ids[:, :50])
        answer = model.generate(ids, **as_argument(model, cache, "generate"), **GREEDY)
    assert torch.equal(answer[:, 50:], expected)


def test_cache_outside_the_block_is_refused_and_still_usable(model):
    engine, ids = small_engine(model), prompt(60)
    cache = engine.prefill(ids[:, :50])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="no engine is attached to"):
            call(ids[:, 50:] if call is model else ids, **as_argument(model, cache))
    expected = engine.generate(ids[:, 50:], cache=engine.prefill(ids[:, :50]), **GREEDY)
    assert torch.equal(engine.generate(ids[:, 50:], cache=cache, **GREEDY), expected)


def test_stock_caches_within_the_block_are_refused(model):
    with small_engine(model):
        with pytest.raises(ValueError, match="DynamicCache; expected a RetainedCache"):
            model.generate(prompt(10), max_new_tokens=1)
        with pytest.raises(ValueError, match="leave out use_cache=False"):
            model(prompt(10), use_cache=False)
        with pytest.raises(ValueError, match="4D attention mask"):
            model(
                prompt(2), attention_mask=torch.zeros(1, 1, 2, 2), **as_argument(model, new_cache())
            )


def test_padding_within_the_block_is_refused(model):
    engine, ids = small_engine(model), prompt(30)
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    with engine:
        cache = engine.prefill(ids[:, :20])
        with pytest.raises(ValueError, match="padding; engine.generate does"):
            model.generate(
                ids, attention_mask=padded, **as_argument(model, cache, "generate"), **GREEDY
            )
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **as_argument(model, cache, "generate"),
            **GREEDY,
        )
    assert answer.shape == (1, 38)


def new_cache():
    return locret.RetainedCache(2)


# --- turns ---


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", ["llama", "phi3", "smollm3"])
def test_turns_without_a_budget_equal_the_whole_conversation(family, positions):
    model = tiny_model(family)
    engine = full_engine(model, positions=positions)
    conversation = prompt(40, seed=1)
    cache = engine.prefill(conversation)
    for turn in range(3):
        question = prompt(6 + turn, seed=10 + turn)
        answer = engine.generate(question, cache=cache, **GREEDY)
        conversation = torch.cat([conversation, question], dim=1)
        whole = engine.generate(conversation, **GREEDY)
        assert torch.equal(answer[:, : question.shape[1]], question)
        assert torch.equal(answer[:, question.shape[1] :], whole[:, conversation.shape[1] :])
        conversation = whole
    assert cache.seen == conversation.shape[1] - 1
    assert torch.equal(cache.token_ids, conversation[:, :-1])


REPEATED = "input_ids begins with all {} tokens that the cache has read"


@pytest.mark.parametrize("following", [0, 1, 6])
@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_whole_conversation_after_what_the_cache_has_read_is_refused(
    model, heads, positions, turns, following
):
    engine = small_engine(model, "locret", heads=heads, positions=positions)
    cache = engine.prefill(prompt(40))
    conversation, question = prompt(40), prompt(6, seed=1)
    for _ in range(turns):
        answer = engine.generate(question, cache=cache, **GREEDY)
        conversation = torch.cat([conversation, answer], dim=1)
    whole = torch.cat([conversation, prompt(following, seed=2)], dim=1)
    untouched = cache.snapshot()
    refused = REPEATED.format(cache.seen) + ".*; give only what follows them"
    for mask in (None, torch.ones_like(whole)):
        with pytest.raises(ValueError, match=refused):
            engine.generate(whole, mask, cache=cache, **GREEDY)
    assert cache.seen == untouched.layers[0].seen
    assert engine.generate(question, cache=cache, **GREEDY).shape == (1, 14)


def test_a_whole_conversation_is_refused_in_any_row(model):
    (context, mask), engine = padded((30, 17, 6), vocab=512), small_engine(model)
    cache = engine.prefill(context, mask)
    for row, length in enumerate((30, 17, 6)):
        own = prompt(length, seed=row, vocab=512)
        rows = [prompt(3 + i, seed=9 + i) for i in range(3)]
        rows[row] = torch.cat([own, rows[row]], dim=1)
        width = max(each.shape[1] for each in rows)
        ids = torch.cat(
            [torch.nn.functional.pad(each, (width - each.shape[1], 0)) for each in rows]
        )
        with pytest.raises(ValueError, match=REPEATED.format(length)):
            engine.generate(ids, (ids > 0).long(), cache=cache, **GREEDY)
    question = prompt(5, batch=3, seed=5)
    assert engine.generate(question, cache=cache, **GREEDY).shape == (3, 13)


def test_a_whole_conversation_after_a_question_read_in_front_is_refused(model):
    engine = small_engine(model, "locret", heads=tiny_heads(model, query_tokens=3))
    question = prompt(4, seed=1)
    cache = engine.prefill(prompt(30), query_ids=question)
    with pytest.raises(ValueError, match=REPEATED.format(30)):
        engine.generate(torch.cat([prompt(30), question], dim=1), cache=cache, **GREEDY)
    assert engine.generate(question, cache=cache, **GREEDY).shape == (1, 12)


@pytest.mark.parametrize("common", [1, 3, 29])
def test_a_question_may_begin_as_its_context_does(model, common, recwarn):
    engine, context = small_engine(model), distinct_prompt(30, 512)
    question = torch.cat([context[:, :common], distinct_prompt(30, 512, seed=1)], dim=1)
    answer = engine.generate(question, cache=engine.prefill(context), **GREEDY)
    assert answer.shape[1] == question.shape[1] + 8
    assert not recwarn


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_question_that_begins_with_a_context_of_a_few_tokens_is_taken_with_a_warning(
    model, length
):
    engine, question = small_engine(model), prompt(9)
    cache = engine.prefill(question[:, :length])
    with pytest.warns(UserWarning, match=REPEATED.format(length)) as told:
        answer = engine.generate(question, cache=cache, **GREEDY)
    assert told[0].filename == __file__
    assert answer.shape == (1, 17)
    twice = torch.cat([question[:, :length], question], dim=1)
    whole = full_engine(model).generate(twice, **GREEDY)
    assert torch.equal(answer, whole[:, length:])


def test_turns_after_sampling_several_answers(model):
    engine = full_engine(model)
    cache = engine.prefill(prompt(40))
    torch.manual_seed(0)
    answers = engine.generate(
        prompt(5, seed=1), cache=cache, do_sample=True, num_return_sequences=3, max_new_tokens=6
    )
    follow_up = prompt(4, batch=3, seed=2)
    next_answers = engine.generate(follow_up, cache=cache, **GREEDY)
    for row in range(3):
        said = torch.cat([prompt(40)[0], answers[row], follow_up[row]])[None]
        whole = engine.generate(said, **GREEDY)
        assert torch.equal(whole[0, said.shape[1] :], next_answers[row, 4:])


def test_turns_within_a_budget_go_on(model, heads):
    engine = small_engine(model, "locret", heads=heads)
    cache = engine.prefill(prompt(80))
    for turn in range(3):
        answer = engine.generate(prompt(5, seed=turn), cache=cache, **GREEDY)
        assert answer.shape == (1, 13)
    # Three times 5 of the question and 8 of the answer, whose very last is not read.
    assert cache.report()["units"] == [20 + 38] * 2
    assert cache.seen == 80 + 38


def test_question_after_a_context_streams_and_stops_as_stock_does(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    engine, streamer = full_engine(model), Collect()
    cache = engine.prefill(prompt(20))
    answer = engine.generate(prompt(4, seed=1), cache=cache, streamer=streamer, **GREEDY)
    assert streamer.tokens == [*answer[0].tolist(), "end"]


def test_dict_of_a_turn_starts_at_the_question(model):
    engine, question = full_engine(model), prompt(4, seed=1)
    output = engine.generate(
        question, cache=engine.prefill(prompt(20)), return_dict_in_generate=True, **GREEDY
    )
    assert output.sequences.shape == (1, 12)
    assert torch.equal(output.sequences[:, :4], question)


def test_cache_advanced_outside_is_refused(model):
    engine = small_engine(model)
    cache = engine.prefill(prompt(20))
    with engine, torch.no_grad():
        model(prompt(1), **as_argument(model, cache))
    with pytest.raises(ValueError, match="seen 21 tokens but knows the ids of 20"):
        engine.generate(prompt(3), cache=cache, **GREEDY)


def test_caches_that_do_not_belong_are_refused(model):
    engine = small_engine(model)
    with pytest.raises(ValueError, match="2 rows and input_ids 1"):
        engine.generate(prompt(3), cache=engine.prefill(prompt(20, batch=2)), **GREEDY)
    deeper = small_engine(tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(ValueError, match="RetainedCache of 3 layers.* of 2"):
        engine.generate(prompt(3), cache=deeper.prefill(prompt(20)), **GREEDY)
    with pytest.raises(ValueError, match="DynamicCache"):
        engine.generate(prompt(3), cache=DynamicCache(), **GREEDY)
    with pytest.raises(ValueError, match="has read nothing yet"):
        engine.generate(prompt(3), cache=new_cache(), **GREEDY)
    with pytest.raises(ValueError, match="cache is a str"):
        engine.generate(prompt(3), cache="runs/book", **GREEDY)


@pytest.mark.parametrize(
    "beams", [{"num_beams": 2}, {"generation_config": GenerationConfig(num_beams=2)}]
)
def test_beams_after_a_context_are_refused_and_leave_it_alone(model, beams):
    engine = small_engine(model)
    cache = engine.prefill(prompt(20))
    with pytest.raises(ValueError, match="beam search would mix up"):
        engine.generate(prompt(3), cache=cache, **beams)
    assert engine.generate(prompt(3), cache=cache, **GREEDY).shape == (1, 11)


def test_cache_of_beams_is_refused_afterwards(model):
    engine = small_engine(model)
    output = engine.generate(
        prompt(30), num_beams=2, num_return_sequences=2, return_dict_in_generate=True, **GREEDY
    )
    with pytest.raises(ValueError, match="by beams"):
        engine.generate(prompt(3, 2), cache=cache_of(output), **GREEDY)


class Stopped(Exception):
    pass


class StopsAfter:
    """A streamer that fails at the so-many-th token."""

    def __init__(self, tokens):
        self.left = tokens

    def put(self, value):
        self.left -= value.dim() == 1
        if self.left < 0:
            raise Stopped

    def end(self):
        pass


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "failing",
    [
        {"num_return_sequences": 2},
        {"temprature": 1.0},
        {"streamer": StopsAfter(0)},
        {"streamer": StopsAfter(2)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_failed_call_leaves_the_context_as_it_was(model, rows, failing):
    engine = small_engine(model)
    cache = engine.prefill(prompt(30, batch=rows))
    question = prompt(5, batch=rows, seed=3)
    mask = torch.ones_like(question)
    mask[0, : 2 * (rows - 1)] = 0  # padded questions are read before they are answered
    untouched = cache.snapshot()
    expected = engine.generate(question, mask, cache=cache, **GREEDY)
    cache.restore(untouched)
    if rows == 2 and "streamer" in failing:
        failing = {"stopping_criteria": [lambda *_: 1 / 0]}  # a streamer takes one row
    with pytest.raises((ValueError, Stopped, ZeroDivisionError)):
        engine.generate(question, mask, cache=cache, **failing, **GREEDY)
    assert cache.seen == 30
    assert torch.equal(engine.generate(question, mask, cache=cache, **GREEDY), expected)


def test_out_of_memory_in_the_first_layer_leaves_the_context_as_it_was(model, monkeypatch):
    engine = small_engine(model)
    cache = engine.prefill(prompt(30))
    untouched = cache.snapshot()
    expected = engine.generate(prompt(5, seed=3), cache=cache, **GREEDY)
    cache.restore(untouched)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("locret.engine.attention.attend_past", out_of_memory)
        engine.generate(prompt(5, seed=3), cache=cache, **GREEDY)
    assert torch.equal(engine.generate(prompt(5, seed=3), cache=cache, **GREEDY), expected)


def test_inference_mode_around_one_call_does_not_matter_to_the_next(model):
    engine = small_engine(model)
    question = prompt(5, seed=3)
    expected = engine.generate(question, cache=engine.prefill(prompt(30)), **GREEDY)
    with torch.inference_mode():
        cache = engine.prefill(prompt(30))
    assert torch.equal(engine.generate(question, cache=cache, **GREEDY), expected)


def test_answers_until_the_end_of_the_turn_take_no_storage_ahead(model):
    engine = small_engine(model)
    cache = engine.prefill(prompt(30))
    engine.generate(
        prompt(5), cache=cache, max_new_tokens=1_000_000, eos_token_id=[*range(model.vocab_size)]
    )
    assert max(layer.store.tail.capacity for layer in cache.layers) < 10_000


def test_what_the_models_configuration_asks_for_is_heeded(model):
    engine = small_engine(model)
    expected = engine.generate(prompt(30), **GREEDY)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        engine.generate(prompt(3), generation_config=GenerationConfig(prompt_lookup_num_tokens=2))
    own = model.generation_config
    model.generation_config = GenerationConfig(
        **own.to_diff_dict() | {"cache_implementation": "static"}
    )
    try:
        assert torch.equal(engine.generate(prompt(30), **GREEDY), expected)
    finally:
        model.generation_config = own


# --- policies ---


def test_full_ignores_the_budget(model):
    engine = full_engine(model)
    assert engine.config.reading.budget is None
    assert kept(engine.prefill(prompt(60))) == list(range(60))


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_streaming_llm_keeps_the_sinks_and_the_most_recent(model, default_dtype):
    torch.set_default_dtype(default_dtype)
    try:
        cache = small_engine(model, "streaming_llm").prefill(prompt(60))
    finally:
        torch.set_default_dtype(torch.float32)
    for layer_idx in range(2):
        for head in range(2):
            assert kept(cache, layer_idx, head) == [0, 1, 2, 3, *range(44, 60)]


def test_streaming_llm_without_sinks_is_a_window(model):
    cache = small_engine(model, POLICIES["streaming_llm"](sinks=0)).prefill(prompt(60))
    assert kept(cache) == list(range(40, 60))


def test_random_is_reproducible_by_seed_and_leaves_the_global_generator_alone(model):
    def kept_by(seed):
        cache = small_engine(model, POLICIES["random"](seed)).prefill(prompt(60))
        return [kept(cache, layer_idx, head) for layer_idx in range(2) for head in range(2)]

    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    first = kept_by(0)
    assert first == kept_by(0) != kept_by(1)
    assert kept_by(-1) == kept_by(-1)
    assert len({tuple(positions) for positions in first}) == 4
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_locret_keeps_what_its_heads_score_highest(model, heads):
    ids = distinct_prompt(60, 512)
    engine = small_engine(model, "locret", heads=heads, chunk_size=None)
    whole = {"chunk_size": None, "budget": 60, "decode_interval": 8}
    scores = small_engine(model, "locret", heads=heads, **whole).prefill(ids)
    for layer_idx in range(1):  # beyond the first eviction, deeper layers see other units
        best = stacked(scores.layers[layer_idx].scores).topk(20).indices.sort().values
        held = engine.prefill(ids).layers[layer_idx].source_positions
        assert torch.equal(stacked(held), best)


def test_policy_of_ones_own_in_a_few_lines(model):
    class LoudKeys(Policy):
        name = "loud_keys"

        def score(self, chunk):
            return chunk.key.norm(dim=-1)

    seen = []

    class Spying(LoudKeys):
        def score(self, chunk):
            seen.append(chunk)
            return super().score(chunk)

    cache = small_engine(model, Spying()).prefill(prompt(16, batch=2))
    assert [(c.layer_idx, c.start, c.key.shape[2]) for c in seen] == [
        (0, 0, 7), (1, 0, 7), (0, 7, 7), (1, 7, 7), (0, 14, 2), (1, 14, 2)
    ]  # fmt: skip
    chunk = seen[-1]
    assert chunk.query.shape == (2, 8, 2, 8)
    assert chunk.key.shape == chunk.value.shape == (2, 2, 2, 8)
    assert chunk.hidden.shape == (2, 2, 64)
    for tap, features in FEATURES.items():
        assert features(chunk).shape == (2, 2, Backbone(model).geometry.feature_width(tap))
    assert chunk.scaling == pytest.approx(8**-0.5)
    assert cache.seen == 16


@pytest.mark.parametrize(
    "reshape",
    [
        lambda scores: scores[..., :-1],
        lambda scores: scores[:, :1],
        lambda scores: scores[:1],
        lambda scores: scores[0],
        lambda scores: scores[..., None],
        lambda scores: scores.transpose(1, 2),
    ],
)
def test_scores_of_another_shape_are_refused(model, reshape):
    class Misshapen(Policy):
        name = "misshapen"

        def score(self, chunk):
            return reshape(chunk.key.norm(dim=-1))

    engine = small_engine(model, Misshapen())
    with pytest.raises(ValueError, match=r"Misshapen returned scores of shape .*\(2, 2, 7\)"):
        engine.prefill(prompt(40, batch=2))
    assert model.config._attn_implementation == "sdpa"


def test_scores_of_a_policy_in_half_precision_are_taken(model):
    class Halves(Policy):
        name = "halves"

        def score(self, chunk):
            return chunk.key.norm(dim=-1).half()

    cache = small_engine(model, Halves(), decode_interval=8).prefill(prompt(60))
    assert cache.layers[0].scores[0][0].dtype == torch.float32


def test_prompts_longer_than_the_window_are_read_in_compact_positions():
    model = tiny_model("llama", max_position_embeddings=40)
    cache = small_engine(model).prefill(prompt(300))
    assert cache.seen == 300
    assert cache.report()["units"] == [20, 20]


def test_gradients_are_not_recorded(model):
    cache = small_engine(model).prefill(prompt(30))
    assert not cache.layers[0].keys.requires_grad
