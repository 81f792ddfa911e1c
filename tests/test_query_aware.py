"""Heads that know the question (Locret-Q): it is read in front of the prompt and never evicted."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import locret
from locret.model.hooks import cache_of
from locret.policies import LocretPolicy
from locret.training.distill import Distillation
from locret.training.segments import Segment, with_query_in_front
from tests import reference
from tests.kept import kept, stacked
from tests.tiny_models import distinct_prompt, prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
QUERY = 6


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=512)


@pytest.fixture(scope="module")
def heads(model):
    return tiny_heads(model, query_tokens=QUERY)


@pytest.fixture(scope="module")
def blind(model):
    """The same weights, without a question."""
    return tiny_heads(model)


def contrary(heads):
    """Heads that give what stands first the lowest scores of all."""

    class Contrary(LocretPolicy):
        def score(self, chunk):
            positions = torch.arange(chunk.start, chunk.start + chunk.key.shape[2])
            return (positions * 1e6).expand(chunk.key.shape[:3])

    return Contrary(heads)


# --- prefill ---


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 7, 64])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_the_query_is_never_evicted_and_stands_first_in_every_head(
    model, heads, chunk_size, positions
):
    context, question = prompt(60), prompt(QUERY, seed=1)
    settings = SMALL | {"chunk_size": chunk_size, "positions": positions}
    for policy in (LocretPolicy(heads), contrary(heads)):
        engine = locret.Engine(model, policy, **settings)
        cache = engine.prefill(context, query_ids=question)
        assert cache.report()["units"] == [20, 20]
        assert cache.query_length == QUERY
        assert cache.seen == 60 + QUERY
        for layer_idx in range(2):
            for head in range(2):
                assert kept(cache, layer_idx, head)[:QUERY] == list(range(QUERY))
        assert torch.equal(cache.token_ids, torch.cat([question, context], dim=1))


def test_a_policy_that_favours_the_newest_evicts_all_but_the_query(model, heads):
    engine = locret.Engine(model, contrary(heads), **SMALL)
    cache = engine.prefill(prompt(60), query_ids=prompt(QUERY, seed=1))
    assert kept(cache, 0, 0) == [*range(QUERY), *range(66 - 14, 66)]


def test_prefill_is_that_of_blind_heads_on_query_and_context(model, heads, blind):
    """Where nothing is evicted only the query in front tells the two apart."""
    context, question = prompt(30), prompt(QUERY, seed=1)
    settings = SMALL | {"budget": 40, "decode_interval": 8}  # scores are needed again
    aware = locret.Engine(model, heads=heads, **settings).prefill(context, query_ids=question)
    plain = locret.Engine(model, heads=blind, **settings).prefill(
        torch.cat([question, context], dim=1)
    )
    for a, b in zip(aware.layers, plain.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(stacked(a.scores), stacked(b.scores))


def test_only_the_querys_last_tokens_are_read_and_fewer_are_welcome(model, heads):
    engine, context = locret.Engine(model, heads=heads, **SMALL), prompt(60)
    long = prompt(3 * QUERY, seed=1)
    cache = engine.prefill(context, query_ids=long)
    assert cache.query_length == QUERY
    assert torch.equal(cache.token_ids[:, :QUERY], long[:, -QUERY:])
    cache = engine.prefill(context, query_ids=long[:, :2])
    assert cache.query_length == 2
    assert kept(cache, 1, 1)[:2] == [0, 1]


def test_prefill_without_a_query_is_refused(model, heads):
    engine = locret.Engine(model, heads=heads, **SMALL)
    with pytest.raises(ValueError, match="query-aware.* 6 tokens of the question.*pass query_ids"):
        engine.prefill(prompt(60))
    for wrong in (torch.ones(1, 0, dtype=torch.long), torch.ones(5, dtype=torch.long)):
        with pytest.raises(ValueError, match="at least one token"):
            engine.prefill(prompt(60), query_ids=wrong)
    with pytest.raises(ValueError, match="query_ids has 2 rows and input_ids 1; they must match"):
        engine.prefill(prompt(60), query_ids=prompt(QUERY, 2))


@pytest.mark.parametrize("policy", ["locret", "random", "full"])
def test_a_query_for_policies_that_do_not_ask_for_one_is_refused(model, blind, heads, policy):
    given = blind if policy == "locret" else heads
    engine = locret.Engine(model, policy, heads=given, **SMALL)
    assert engine.config.recorded.query_tokens == 0
    with pytest.raises(ValueError, match="the policy's heads are not query-aware"):
        engine.prefill(prompt(60), query_ids=prompt(QUERY))
    assert engine.prefill(prompt(60)).query_length == 0


def test_heads_inside_a_policy_are_as_query_aware(model, heads):
    engine = locret.Engine(model, LocretPolicy(heads), **SMALL)
    assert engine.config.recorded.query_tokens == QUERY
    by_name = locret.Engine(model, heads=heads, **SMALL)
    ids = prompt(60)
    assert torch.equal(engine.generate(ids, **GREEDY), by_name.generate(ids, **GREEDY))
    with pytest.raises(ValueError, match="pass query_ids"):
        engine.prefill(ids)


@pytest.mark.parametrize(("budget", "stabilizers"), [(5, 0), (8, 3)])
def test_a_budget_that_does_not_hold_the_query_is_refused(model, heads, budget, stabilizers):
    settings = SMALL | {"budget": budget, "stabilizers": stabilizers}
    with pytest.raises(ValueError, match=rf"the heads keep 6 query tokens but the .* {budget}"):
        locret.Engine(model, heads=heads, **settings)


def test_a_budget_of_nothing_but_the_query_and_stabilizers(model, heads):
    engine = locret.Engine(model, heads=heads, **SMALL | {"budget": 9})
    cache = engine.prefill(prompt(60), query_ids=prompt(QUERY, seed=1))
    assert cache.report()["units"] == [9, 9]
    assert kept(cache, 1, 0)[:QUERY] == list(range(QUERY))


# --- generate ---


@pytest.mark.parametrize("batch", [1, 2])
def test_the_answer_follows_the_prompt_without_the_repeated_query(model, heads, batch):
    ids = prompt(60, batch)
    output = locret.Engine(model, heads=heads, **SMALL).generate(
        ids, return_dict_in_generate=True, **GREEDY
    )
    assert output.sequences.shape == (batch, 68)
    assert torch.equal(output.sequences[:, :60], ids)
    cache = cache_of(output)
    assert cache.query_length == QUERY
    assert cache.seen == QUERY + 60 + 7
    whole = torch.cat([ids[:, -QUERY:], output.sequences], dim=1)
    assert torch.equal(cache.token_ids, whole[:, :-1])
    for layer_idx in range(2):
        assert kept(cache, layer_idx, 0)[:QUERY] == list(range(QUERY))


def test_the_answer_is_that_of_the_naive_twin_with_the_query_in_front(model, heads):
    """With all but the query free to go, as the twin evicts after reading query + prompt."""
    ids = distinct_prompt(40, 512)
    front = torch.cat([ids[:, -QUERY:], ids], dim=1)
    settings = reference.Settings(budget=100, chunk_size=7, stabilizers=3, local_tokens=5)
    _, expected = reference.run(model, heads, front, settings)
    engine = locret.Engine(model, heads=heads, **vars(settings))
    output = engine.generate(
        ids, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    assert (output.logits[0][0] - expected).abs().max() < 1e-4


def test_prefill_then_generate_is_one_call(model, heads):
    ids, engine = prompt(60), locret.Engine(model, heads=heads, **SMALL)
    expected = engine.generate(ids, **GREEDY)
    cache = engine.prefill(ids[:, :55], query_ids=ids[:, -QUERY:])
    answer = engine.generate(ids[:, 55:], cache=cache, **GREEDY)
    assert torch.equal(answer, expected[:, 55:])
    again = engine.generate(prompt(4, seed=3), cache=cache, **GREEDY)
    assert again.shape == (1, 12)
    assert cache.seen == QUERY + 60 + 8 + 4 + 7


@pytest.mark.parametrize("length", [1, 5, 6, 8])
def test_prompts_about_as_long_as_the_local_tokens(model, heads, length):
    engine, ids = locret.Engine(model, heads=heads, **SMALL), prompt(length)
    answer = engine.generate(ids, **GREEDY)
    assert torch.equal(answer[:, :length], ids)
    assert answer.shape == (1, length + 8)
    if length <= 5:  # nothing is compressed: no query is needed
        assert torch.equal(answer, model.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    "given",
    [
        {"max_length": 63},
        {"generation_config": GenerationConfig(max_length=63, pad_token_id=0)},
        {"max_new_tokens": 3},
        {"generation_config": GenerationConfig(max_new_tokens=3, pad_token_id=0)},
        {"max_new_tokens": 3, "num_beams": 2},
        {"max_new_tokens": 3, "num_return_sequences": 2, "do_sample": True},
    ],
    ids=str,
)
def test_limits_do_not_count_the_repeated_query(model, heads, given):
    answer = locret.Engine(model, heads=heads, **SMALL).generate(prompt(60), **given)
    assert answer.shape[1] == 63
    assert torch.equal(answer[:1, :60], prompt(60))


def test_progress_counts_the_query(model, heads):
    calls = []
    engine = locret.Engine(model, heads=heads, **SMALL, progress=lambda *done: calls.append(done))
    engine.prefill(prompt(15), query_ids=prompt(QUERY, seed=1))
    assert calls == [(7, 21), (14, 21), (21, 21)]


def test_requests_do_not_see_each_other(model, heads):
    engine = locret.Engine(model, heads=heads, **SMALL)
    prompts = [prompt(60, seed=1), prompt(45, seed=2), prompt(3, seed=3)]
    fresh = [locret.Engine(model, heads=heads, **SMALL).generate(p, **GREEDY) for p in prompts]
    for which in (2, 0, 1, 0, 2):
        assert torch.equal(engine.generate(prompts[which], **GREEDY), fresh[which])


class Collecting(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


def test_the_answer_is_streamed(model, heads):
    streamer = Collecting()
    engine = locret.Engine(model, heads=heads, **SMALL)
    answer = engine.generate(prompt(60), streamer=streamer, **GREEDY)
    assert streamer.tokens == answer[0].tolist()


# --- unchanged without ---


def test_without_a_budget_nothing_is_scored_and_no_query_is_read(model, heads):
    ids = prompt(60)
    engine = locret.Engine(model, heads=heads, **SMALL | {"budget": None})
    assert torch.equal(engine.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    for given in (None, ids[:, -QUERY:]):
        cache = engine.prefill(ids, query_ids=given)
        assert (cache.seen, cache.query_length) == (60, 0)


def test_zero_query_tokens_is_the_ordinary_engine(model, blind):
    zero = tiny_heads(model, query_tokens=0)
    assert zero.config == blind.config
    cache = locret.Engine(model, heads=zero, **SMALL).prefill(prompt(60))
    assert (cache.seen, cache.query_length) == (60, 0)
    cache.reset()
    assert cache.query_length == 0


def test_a_reset_forgets_the_query(model, heads):
    cache = locret.Engine(model, heads=heads, **SMALL).prefill(
        prompt(60), query_ids=prompt(QUERY, seed=1)
    )
    cache.reset()
    assert cache.query_length == 0


# --- training and inference agree ---


def test_heads_read_the_same_in_training_and_in_the_engine(model, heads):
    ids = prompt(48)
    row = with_query_in_front(ids, [Segment.single(40, 48)], QUERY)
    engine = locret.Engine(model, heads=heads, decode_interval=8, **SMALL | {"budget": 100})
    trained = Distillation(engine.backbone, heads, keep_scores=True)(*row).predictions
    cache = engine.prefill(ids[:, :40], query_ids=ids[:, :40][:, -QUERY:])
    for layer, predictions in zip(cache.layers, trained, strict=True):
        scores = stacked(layer.scores)
        assert scores.shape == predictions.shape == (1, 2, QUERY + 40)
        assert (scores - predictions).abs().max() < 1e-4


def test_the_question_in_front_counts_for_no_length(model, heads, blind):
    for some in (heads, blind):
        engine = locret.Engine(model, heads=some, **SMALL)
        ends = int(engine.generate(prompt(65), max_new_tokens=2)[0, 65])
        lengths = {"max_length": 90, "min_length": 70, "eos_token_id": ends}
        assert engine.generate(prompt(65), do_sample=False, **lengths).shape[1] >= 70


def test_a_length_of_the_models_own_does_not_count_the_question_either(heads):
    model = tiny_model("llama", vocab_size=512)
    engine = locret.Engine(model, heads=heads, **SMALL)
    model.generation_config.eos_token_id = int(engine.generate(prompt(65), **GREEDY)[0, 65])
    model.generation_config.min_length = 70
    assert engine.generate(prompt(65), **GREEDY).shape[1] >= 70


def test_rows_with_and_without_a_question_do_not_evict_answers_together(model, heads):
    engine = locret.Engine(model, heads=heads, decode_interval=2, **SMALL)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :-4] = 0
    with pytest.raises(ValueError, match="ask one row at a time"):
        engine.generate(prompt(60, batch=2), attention_mask=mask, **GREEDY)
