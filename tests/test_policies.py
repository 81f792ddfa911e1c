"""Every policy against its naive twin, in chunks and at once; requests, batches, long answers."""

import ast
import re
from pathlib import Path

import pytest
import torch

import locret
from locret.policies import POLICIES, LayerChunk, Policy
from locret.policies.attention import (
    ExpectedAttentionPolicy,
    H2OPolicy,
    PyramidKVPolicy,
    SnapKVPolicy,
    pyramid,
)
from locret.policies.plain import SirLLMPolicy, StreamingLLMPolicy
from tests import policy_reference
from tests.kept import kept_of, stacked
from tests.policy_reference import RULES
from tests.test_batches import assert_each_row_as_alone
from tests.tiny_models import FAMILIES, distinct_prompt, prompt, tiny_heads, tiny_model

VOCAB = 512  # distinct tokens: equal ones would score alike in the first layer
TRAINING_FREE = sorted(set(POLICIES) - {"locret", "full"})
IN_CHUNKS = sorted(name for name in TRAINING_FREE if not POLICIES[name].rereads)
"""Those that may evict after any chunk, and while answering."""


@pytest.fixture(scope="module", params=[2, 8], ids=["GQA", "MHA"])
def model(request):
    return tiny_model("llama", num_key_value_heads=request.param, vocab_size=VOCAB)


def kept(cache):
    """Source positions by layer and head."""
    return [rows[0] for rows in kept_of(cache)]


def assert_as_the_twin(model, policy, rule, length, budget, chunk_size, stabilizers):
    ids = distinct_prompt(length, VOCAB)
    engine = locret.Engine(
        model, policy, budget=budget, chunk_size=chunk_size, stabilizers=stabilizers
    )
    cache = engine.prefill(ids)
    expected, _ = policy_reference.read(
        model, rule, ids[0].tolist(), budget, chunk_size, stabilizers
    )
    assert kept(cache) == expected


@pytest.mark.parametrize("chunk_size", [7, 13, None])
@pytest.mark.parametrize("name", sorted(set(RULES) - {"pyramidkv"}))
def test_kept_units_are_the_twins(model, name, chunk_size):
    assert_as_the_twin(model, name, RULES[name](), 47, 17, chunk_size, 3)


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (PyramidKVPolicy(), policy_reference.PyramidKV()),
        (SnapKVPolicy(6, 7, "max"), policy_reference.SnapKV(6, 7, "max")),
    ],
)
def test_max_pooling_keeps_units_that_score_as_the_twins(model, policy, rule):
    """Neighbours of a maximum score alike, and which of them stay is nobody's business."""
    ids = distinct_prompt(47, VOCAB)
    engine = locret.Engine(model, policy, budget=17, chunk_size=None)
    expected, scores = policy_reference.read(model, rule, ids[0].tolist(), 17, None, 0)
    for got, theirs, of_layer in zip(kept(engine.prefill(ids)), expected, scores, strict=True):
        for mine, twins, row in zip(got, theirs, of_layer, strict=True):
            chosen = [sorted(row[i] for i in units) for units in (mine, twins)]
            assert chosen[0] == pytest.approx(chosen[1], abs=1e-5)


VARIANTS = [
    (SnapKVPolicy(5, 3), policy_reference.SnapKV(5, 3)),
    (SnapKVPolicy(1, 1), policy_reference.SnapKV(1, 1)),
    (SnapKVPolicy(9, 3), policy_reference.SnapKV(9, 3)),
    (SnapKVPolicy(32, 7), policy_reference.SnapKV(32, 7)),  # above the budget
    (PyramidKVPolicy(3, 5, "avg", 2), policy_reference.PyramidKV(3, 5, "avg", 2)),
    (StreamingLLMPolicy(0), policy_reference.StreamingLLM(0)),
    (SirLLMPolicy(1, 2), policy_reference.SirLLM(1, 2)),
    (SirLLMPolicy(0, 0, 0.7), policy_reference.SirLLM(0, 0, 0.7)),
    (ExpectedAttentionPolicy(3, 9), policy_reference.ExpectedAttention(3, 9)),
    (H2OPolicy(block=2), policy_reference.H2O()),
]


@pytest.mark.parametrize("chunk_size", [1, 5, 30])
@pytest.mark.parametrize(
    ("policy", "rule"), VARIANTS, ids=[f"{p.name}{i}" for i, (p, _) in enumerate(VARIANTS)]
)
def test_parameters_mean_what_they_say(policy, rule, chunk_size):
    model = tiny_model("llama", vocab_size=VOCAB)
    assert_as_the_twin(model, policy, rule, 31, 11, chunk_size, 2)


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_requests_do_not_leak_into_each_other(model, name):
    engine = locret.Engine(model, name, budget=17, chunk_size=9, stabilizers=2)
    alone = kept(engine.prefill(prompt(40, vocab=VOCAB)))
    before = dict(vars(engine.policy))
    engine.prefill(prompt(70, seed=1, batch=2, vocab=VOCAB))
    assert kept(engine.prefill(prompt(40, vocab=VOCAB))) == alone
    assert vars(engine.policy) == before


# Random scores of a row depend on the batch it is in; the others are those of the row alone.
@pytest.mark.parametrize("name", sorted(set(IN_CHUNKS) - {"random"}))
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_padded_rows_while_the_answer_is_evicted(name, positions):
    model = tiny_model("llama", vocab_size=8192)
    engine = locret.Engine(
        model,
        name,
        budget=20,
        chunk_size=7,
        stabilizers=3,
        local_tokens=5,
        decode_interval=4,
        positions=positions,
    )
    assert_each_row_as_alone(engine, (60, 50, 41), vocab=8192, max_new_tokens=30)
    # Rows evict at the same steps; a short one then loses nothing but slots that it never filled.
    assert_each_row_as_alone(engine, (60, 3, 4), vocab=8192, max_new_tokens=5)


@pytest.mark.parametrize("name", IN_CHUNKS)
def test_answers_stay_bounded_and_scores_finite(model, name):
    engine = locret.Engine(
        model, name, budget=20, chunk_size=7, stabilizers=3, local_tokens=5, decode_interval=6
    )
    cache = engine.prefill(prompt(60, vocab=VOCAB))
    engine.generate(prompt(3, vocab=VOCAB), cache=cache, max_new_tokens=40, do_sample=False)
    limits = engine.policy.budgets(20, 2, 60)
    for layer, limit in zip(cache.layers, limits, strict=True):
        assert layer.longest <= limit + 5
        assert stacked(layer.scores).isfinite().all()


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_a_chunk_as_long_as_the_prompt_is_one_shot(model, name):
    """The whole prompt is read before one eviction, which no stabilizers are part of."""
    ids, settings = prompt(40, vocab=VOCAB), {"budget": 17, "local_tokens": 5}
    at_once = locret.Engine(model, name, chunk_size=None, stabilizers=0, **settings)
    for chunk_size in (40, 4096):
        one = locret.Engine(model, name, chunk_size=chunk_size, stabilizers=3, **settings)
        assert kept(one.prefill(ids)) == kept(at_once.prefill(ids))


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_room_for_everything_changes_nothing(model, name):
    ids = prompt(40, vocab=VOCAB)
    ours = locret.Engine(model, name, budget=400, chunk_size=9).generate(
        ids, max_new_tokens=9, do_sample=False
    )
    assert torch.equal(ours, model.generate(ids, max_new_tokens=9, do_sample=False))


@pytest.mark.parametrize("name", IN_CHUNKS)
def test_saved_contexts_go_on_as_the_cache_would(model, name, tmp_path):
    engine = locret.Engine(
        model, name, budget=20, chunk_size=7, stabilizers=3, local_tokens=5, decode_interval=3
    )
    cache = engine.prefill(prompt(60, vocab=VOCAB))
    cache.save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    question = prompt(4, seed=1, vocab=VOCAB)
    a, b = (
        engine.generate(question, cache=each, max_new_tokens=20, do_sample=False)
        for each in (cache, loaded)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_surprisal_is_that_of_the_stock_model(family):
    model, ids, seen = tiny_model(family), prompt(30, batch=2), []

    class Listening(SirLLMPolicy):
        def reconsider(self, scores, surprisal):
            seen.append(surprisal())
            return super().reconsider(scores, surprisal)

    engine = locret.Engine(model, Listening(), budget=90, chunk_size=7, longrope="by_length")
    engine.prefill(ids)
    with torch.no_grad():
        stock = model(ids).logits.log_softmax(dim=-1)[:, :-1]
    expected = -stock.gather(-1, ids[:, 1:, None])[..., 0]
    given = torch.cat(seen, dim=1)
    assert given[:, 0].isinf().all()
    torch.testing.assert_close(given[:, 1:], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("budget", "layers", "context", "beta", "window"),
    [(100, 7, 1000, 20, 8), (33, 5, 40, 20, 8), (17, 2, 1000, 20, 8), (64, 32, 9999, 14, 0)],
)
def test_pyramids_fall_and_keep_their_total(budget, layers, context, beta, window):
    budgets = pyramid(budget, layers, context, beta, window)
    assert sum(budgets) == budget * layers
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] <= context
    assert min(budgets) >= window


@pytest.mark.parametrize("budget", [3, 8, 50, 70])
def test_pyramids_where_there_is_nothing_to_share_are_flat(budget):
    expected = [budget] * 4
    assert pyramid(budget, 4, context=50, window=8) == expected or 8 < budget < 50


WRONG = [
    (SnapKVPolicy, {"window": 0}, "window is 0"),
    (SnapKVPolicy, {"kernel": 4}, "an odd number"),
    (SnapKVPolicy, {"pooling": "sum"}, "'avg' or 'max'"),
    (PyramidKVPolicy, {"beta": 0.5}, "beta is 0.5"),
    (H2OPolicy, {"recent_share": 1.5}, "from 0 to 1"),
    (H2OPolicy, {"block": 0}, "at least 1"),
    (SirLLMPolicy, {"sinks": -1}, "at least 0"),
    (SirLLMPolicy, {"decay": 0.0}, "above 0"),
    (SirLLMPolicy, {"recent": 3.5}, "a whole number"),
    (SnapKVPolicy, {"kernel": 5.0}, "a whole number"),
    (PyramidKVPolicy, {"beta": float("inf")}, "a number of at least 1"),
    (ExpectedAttentionPolicy, {"future": 0}, "at least 1"),
]


@pytest.mark.parametrize(("policy", "arguments", "message"), WRONG)
def test_parameters_are_checked(policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        policy(**arguments)


def test_every_policy_is_in_the_documented_table():
    table = (Path(__file__).parent.parent / "docs" / "policies.md").read_text().split("## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == sorted(POLICIES)


def test_a_policy_takes_few_lines(model):
    class ValueNorm(Policy):
        name = "value_norm"

        def score(self, chunk: LayerChunk):
            return chunk.value.norm(dim=-1)

    cache = locret.Engine(model, ValueNorm(), budget=9, chunk_size=7, stabilizers=0).prefill(
        prompt(40, vocab=VOCAB)
    )
    assert cache.report()["units"] == [9, 9]


# --- the question in sight ---


@pytest.mark.parametrize("chunk_size", [7, 10, None])
@pytest.mark.parametrize("name", sorted(set(RULES) - {"pyramidkv"}))
def test_the_last_chunk_ends_with_the_question(model, name, chunk_size):
    """But for the prompt's last token, which is read after the final eviction."""
    ids, seen = distinct_prompt(48, VOCAB), []
    engine = locret.Engine(
        model,
        name,
        budget=17,
        chunk_size=chunk_size,
        stabilizers=3,
        local_tokens=6,
        query_aware=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    with engine:
        cache = engine._reader.read_prompt(ids, [0])
    expected, _ = policy_reference.read(
        model, RULES[name](), ids[0, :-1].tolist(), 17, chunk_size, 3, together=5
    )
    assert kept(cache) == expected
    assert seen[-1] == (47, 47)
    assert len(seen) == 1 or seen[-2][0] <= 42
    answer = engine.generate(ids, max_new_tokens=5, do_sample=False)
    assert answer.shape == (1, 53)


@pytest.mark.parametrize("chunk_size", [7, None])
@pytest.mark.parametrize("name", sorted(set(RULES) - {"pyramidkv"}))
def test_a_question_is_seen_behind_the_context_and_given_up(model, name, chunk_size):
    ids = distinct_prompt(47, VOCAB)
    context, question = ids[:, :40], ids[:, 40:]
    engine = locret.Engine(
        model,
        name,
        budget=17,
        chunk_size=chunk_size,
        stabilizers=3,
        local_tokens=6,
        query_aware=True,
        decode_interval=2,
    )
    cache = engine.prefill(context, query_ids=question)
    expected, _ = policy_reference.read(
        model, RULES[name](), ids[0].tolist(), 17, chunk_size, 3, together=7, drop=7
    )
    assert kept(cache) == expected
    assert cache.seen == 40
    assert cache.report()["units"] == [17, 17]
    assert torch.equal(cache.token_ids, context)
    answer = engine.generate(question, cache=cache, max_new_tokens=9, do_sample=False)
    assert answer.shape == (1, 16)


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_without_eviction_a_question_seen_leaves_no_trace(model, name):
    ids = prompt(40, vocab=VOCAB)
    stock = model.generate(ids, max_new_tokens=9, do_sample=False)
    engine = locret.Engine(model, name, budget=400, chunk_size=9, query_aware=True)
    assert torch.equal(engine.generate(ids, max_new_tokens=9, do_sample=False), stock)
    cache = engine.prefill(ids[:, :30], query_ids=ids[:, 30:])
    assert cache.report()["units"] == [30, 30]
    asked = engine.generate(ids[:, 30:], cache=cache, max_new_tokens=9, do_sample=False)
    assert torch.equal(asked, stock[:, 30:])


@pytest.mark.parametrize("chunk_size", [10, None])
@pytest.mark.parametrize("name", ["sirllm", "expected_attention", "snapkv"])
def test_of_a_question_given_up_nothing_is_remembered(model, name, chunk_size):
    ids = distinct_prompt(37, VOCAB)
    context, question = ids[:, :30], ids[:, 30:]
    settings = {"budget": 400, "chunk_size": chunk_size, "decode_interval": 4}
    plain = locret.Engine(model, name, **settings).prefill(context)
    aware = locret.Engine(model, name, query_aware=True, **settings)
    for layer, seen in zip(
        aware.prefill(context, query_ids=question).layers, plain.layers, strict=True
    ):
        assert seen.state or name == "sirllm"  # which remembers in the first layer alone
        assert sorted(layer.state) == sorted(seen.state)
        for what, value in layer.state.items():
            expected = seen.state[what].clone()
            if what == "window_queries":
                expected[:, :, :7] = 0  # a question takes its share of the window
            assert torch.allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(TRAINING_FREE) - {"random"}))
def test_padded_rows_see_their_questions(name):
    model = tiny_model("llama", vocab_size=8192)
    engine = locret.Engine(
        model, name, budget=20, chunk_size=7, stabilizers=3, local_tokens=5, query_aware=True
    )
    assert_each_row_as_alone(engine, (60, 33, 5, 1), vocab=8192, max_new_tokens=5)


def test_query_aware_engines_ask_for_the_question(model):
    engine = locret.Engine(model, "tova", budget=20, stabilizers=3, query_aware=True)
    with pytest.raises(ValueError, match="pass query_ids, or leave query_aware out"):
        engine.prefill(prompt(40))


def test_heads_that_read_the_question_in_front_need_no_switch(model):
    heads = tiny_heads(model, query_tokens=3)
    with pytest.raises(ValueError, match="already; leave it out"):
        locret.Engine(model, heads=heads, budget=20, stabilizers=3, query_aware=True)


def test_every_class_with_a_name_in_the_package_is_a_policy():
    named = {
        (class_.name, statement.value.value)
        for path in Path(locret.policies.__file__).parent.glob("*.py")
        for class_ in ast.walk(ast.parse(path.read_text()))
        if isinstance(class_, ast.ClassDef)
        for statement in class_.body
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "name"
    }
    assert named == {(kind.__name__, name) for name, kind in POLICIES.items()}
