"""Rows of different lengths, padded on the left: each is answered as it would be alone."""

import pytest
import torch

import locret
from locret.model.hooks import cache_of
from tests.kept import kept_of
from tests.tiny_models import FAMILIES, VOCAB, prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def padded(lengths, pad=0, vocab=VOCAB):
    width = max(lengths)
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = prompt(length, seed=row, vocab=vocab)[0]
        mask[row, width - length :] = 1
    return ids, mask


def assert_each_row_as_alone(engine, lengths, vocab=VOCAB, **kwargs):
    ids, mask = padded(lengths, vocab=vocab)
    together = engine.generate(ids, attention_mask=mask, **GREEDY | kwargs)
    assert torch.equal(together[:, : ids.shape[1]], ids)
    for row, length in enumerate(lengths):
        alone = engine.generate(prompt(length, seed=row, vocab=vocab), **GREEDY | kwargs)
        assert torch.equal(together[row, ids.shape[1] :], alone[0, length:]), length


LENGTHS = [(60, 33), (41, 60, 47, 5, 1, 6), (4, 3, 1), (30, 2), (12, 13)]


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_rows_within_a_budget(lengths, positions, attn):
    model = tiny_model("llama", attn_implementation=attn)
    engine = locret.Engine(model, heads=tiny_heads(model), positions=positions, **SMALL)
    assert_each_row_as_alone(engine, lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_every_architecture(family):
    model = tiny_model(family)
    engine = locret.Engine(model, heads=tiny_heads(model), **SMALL)
    assert_each_row_as_alone(engine, (40, 23, 4))


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_longrope_by_length_rows_on_both_sides_of_the_window(positions):
    model = tiny_model("phi3")
    engine = locret.Engine(
        model, "random", longrope="by_length", positions=positions, **SMALL | {"budget": 90}
    )
    assert_each_row_as_alone(engine, (130, 60, 99))


def test_rows_while_evicting_the_answer():
    # So many words that no token comes twice: equal ones would score alike in the first layer.
    model = tiny_model("llama", vocab_size=8192)
    engine = locret.Engine(model, heads=tiny_heads(model), decode_interval=4, **SMALL)
    assert_each_row_as_alone(engine, (60, 33, 27), vocab=8192, max_new_tokens=30)


def test_rows_with_multi_head_attention():
    model = tiny_model("llama", num_key_value_heads=8)
    engine = locret.Engine(model, heads=tiny_heads(model), **SMALL)
    assert_each_row_as_alone(engine, (40, 23))


def test_query_aware_rows():
    model = tiny_model("llama")
    heads = tiny_heads(model, query_tokens=3)
    engine = locret.Engine(model, heads=heads, **SMALL)
    assert_each_row_as_alone(engine, (40, 23, 4, 7))


@pytest.mark.parametrize("lengths", [(40, 17, 3), (3, 40, 17), (5, 40), (1, 3, 5)])
def test_stock_left_padding_agrees_without_a_budget(lengths):
    """Rows that are no longer than the local tokens have no context, wherever they stand."""
    model = tiny_model("llama")
    ids, mask = padded(lengths)
    stock = model.generate(ids, attention_mask=mask, **GREEDY)
    ours = locret.Engine(model, "full", chunk_size=7, local_tokens=5).generate(
        ids, attention_mask=mask, **GREEDY
    )
    assert torch.equal(ours, stock)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.5},
        {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_stock_processors_know_what_is_padding(settings):
    """Scores of all tokens, that of the padding included: often it is a token that ends answers."""
    model = tiny_model("llama")
    ids, mask = padded((40, 17, 3))
    given = GREEDY | {"return_dict_in_generate": True, "output_scores": True} | settings
    engine, answers = locret.Engine(model, "full", chunk_size=7, local_tokens=5), []
    for generate in (engine.generate, model.generate):
        torch.manual_seed(0)
        answers.append(generate(ids, attention_mask=mask, **given))
    ours, stock = answers
    assert torch.equal(ours.sequences, stock.sequences)
    for own, other in zip(ours.scores, stock.scores, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_a_later_question_knows_what_was_padding():
    model = tiny_model("llama")
    engine = locret.Engine(model, "full", chunk_size=7, local_tokens=5)
    ids, mask = padded((40, 17))
    question = prompt(6, batch=2, seed=9)
    told = torch.cat([ids, question], dim=1)
    told_mask = torch.cat([mask, torch.ones_like(question)], dim=1)
    given = GREEDY | {"repetition_penalty": 1.5, "pad_token_id": 0}
    cache = engine.prefill(ids, attention_mask=mask)
    ours = engine.generate(question, cache=cache, **given)
    stock = model.generate(told, attention_mask=told_mask, **given)
    assert torch.equal(ours, stock[:, 40:])


def test_padded_in_common():
    model = tiny_model("llama")
    engine = locret.Engine(model, heads=tiny_heads(model), **SMALL)
    ids = torch.cat([torch.zeros(2, 6, dtype=torch.long), prompt(40, batch=2)], dim=1)
    mask = (torch.arange(46) >= 6).long().expand(2, 46)
    ours = engine.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours[:, 46:], engine.generate(prompt(40, batch=2), **GREEDY)[:, 40:])


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_contexts_of_different_lengths_are_asked_together(positions):
    model = tiny_model("llama")
    engine = locret.Engine(model, heads=tiny_heads(model), positions=positions, **SMALL)
    lengths = (60, 33, 14)
    ids, mask = padded(lengths)
    cache = engine.prefill(ids, attention_mask=mask)
    held = [[20, 20], [20, 20], [14, 14]]  # a row of 14 tokens takes no more than they do
    assert cache.report(heads=True)["head_units"] == [held, held]
    question = prompt(6, batch=3, seed=9)
    together = engine.generate(question, cache=cache, **GREEDY)
    again = engine.generate(question[:, :2], cache=cache, **GREEDY)
    for row, length in enumerate(lengths):
        alone = engine.prefill(prompt(length, seed=row))
        first = engine.generate(question[row : row + 1], cache=alone, **GREEDY)
        assert torch.equal(together[row], first[0])
        second = engine.generate(question[row : row + 1, :2], cache=alone, **GREEDY)
        assert torch.equal(again[row], second[0])


def test_padding_takes_no_slot_that_content_needs():
    model = tiny_model("llama")
    engine = locret.Engine(model, heads=tiny_heads(model), **SMALL)
    ids, mask = padded((60, 33))
    cache = engine.prefill(ids, attention_mask=mask)
    alone = engine.prefill(prompt(33, seed=1))
    for of_layer, single in zip(kept_of(cache), kept_of(alone), strict=True):
        assert of_layer[1] == single[0]
    assert all((layer.lengths == 20).all() for layer in cache.layers)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("quantization", [None, {"name": "kivi", "bits": 8, "residual": 3}])
def test_questions_of_different_lengths_are_asked_together(positions, quantization):
    model = tiny_model("llama", vocab_size=8192)
    settings = SMALL | {"positions": positions, "quantization": quantization}
    engine = locret.Engine(model, heads=tiny_heads(model), **settings)
    contexts, turns = (60, 33, 33, 14), ((6, 2, 3, 3), (2, 2, 7, 1))
    ids, mask = padded(contexts, vocab=8192)
    cache = engine.prefill(ids, attention_mask=mask)
    alone = [engine.prefill(ids[row : row + 1, -n:]) for row, n in enumerate(contexts)]
    for lengths in turns:
        asked, mask = padded(lengths, vocab=8192)
        together = engine.generate(asked, attention_mask=mask, cache=cache, **GREEDY)
        assert torch.equal(together[:, : asked.shape[1]], asked)
        for row, length in enumerate(lengths):
            own = engine.generate(asked[row : row + 1, -length:], cache=alone[row], **GREEDY)
            assert torch.equal(together[row, asked.shape[1] :], own[0, length:])
    for of_layer, *own in zip(kept_of(cache), *map(kept_of, alone), strict=True):
        assert of_layer == [row for (row,) in own]


def test_questions_that_do_not_go_together_are_refused():
    model = tiny_model("llama")
    engine = locret.Engine(model, "random", **SMALL)
    cache = engine.prefill(prompt(40, batch=2))
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="a question of one token cannot be asked together"):
        engine.generate(prompt(3, batch=2), attention_mask=mask, cache=cache)
    engine = locret.Engine(model, "random", decode_interval=2, **SMALL)
    mask[0, 1] = 1
    with pytest.raises(ValueError, match="with decode_interval or recall, questions cannot"):
        engine.generate(prompt(3, batch=2), attention_mask=mask, cache=cache)


def test_rows_that_chunks_are_read_with_change_nothing(monkeypatch):
    model = tiny_model("llama")
    engine = locret.Engine(model, "h2o", **SMALL)
    chunks = []
    engine.progress = lambda done, total: chunks.append(done)
    ids, mask = padded((60, 59, 33, 33, 5))
    together = engine.generate(ids, mask, **GREEDY)
    assert len(chunks) < 20
    monkeypatch.setattr("locret.engine.contexts.TOGETHER", 1)
    chunks.clear()
    assert torch.equal(engine.generate(ids, mask, **GREEDY), together)
    assert len(chunks) == 8 + 8 + 4 + 4


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_many_rows_of_one_length_are_read_a_few_at_a_time(monkeypatch, positions):
    monkeypatch.setattr("locret.engine.contexts.TOGETHER", 2 * SMALL["chunk_size"])
    model = tiny_model("llama")
    engine = locret.Engine(model, heads=tiny_heads(model), positions=positions, **SMALL)
    read = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    assert_each_row_as_alone(engine, (40,) * 5)
    ids, _ = padded((40,) * 5)
    read.clear()
    assert engine.prefill(ids).token_ids.shape == (5, 40)
    assert max(read) == 2 * SMALL["chunk_size"] and sum(read) == ids.numel()


def test_beams_of_padded_rows():
    model = tiny_model("llama")
    engine = locret.Engine(model, heads=tiny_heads(model), **SMALL)
    assert_each_row_as_alone(engine, (40, 23), num_beams=3)


@pytest.mark.parametrize("branching", [{"num_beams": 2}, {"num_beams": 4, "early_stopping": True}])
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("lengths", [(3, 5), (60, 33), (4, 41, 2)])
def test_beams_of_rows_shorter_than_the_local_tokens_too(lengths, positions, branching):
    model = tiny_model("llama")
    engine = locret.Engine(model, "streaming_llm", positions=positions, **SMALL)
    assert_each_row_as_alone(engine, lengths, **branching)


def test_beams_have_the_rotation_of_their_row():
    engine = locret.Engine(
        tiny_model("phi3"), "streaming_llm", longrope="by_length", **SMALL | {"budget": 200}
    )
    assert_each_row_as_alone(engine, (40, 150), num_beams=2)


@pytest.mark.parametrize("scheme", ["kivi", "kvquant", "fp8"])
def test_packed_rows_do_not_know_what_they_are_padded_with(scheme):
    engine = locret.Engine(
        tiny_model("llama", head_dim=32),
        "streaming_llm",
        budget=128,
        chunk_size=32,
        stabilizers=2,
        local_tokens=100,
        quantization={"name": scheme, "group": 16} if scheme != "fp8" else scheme,
    )
    logits = []
    for pad in (0, 1):
        ids, mask = padded((90, 50), pad)
        output = engine.generate(
            ids, mask, return_dict_in_generate=True, output_logits=True, **GREEDY
        )
        logits.append(torch.stack(output.logits))
    assert torch.equal(*logits)


@pytest.mark.parametrize("lengths", [(30, 300), (300, 30)])
def test_a_share_of_rows_that_evict_their_answers_is_that_of_the_longest(lengths):
    settings = SMALL | {"budget": 0.5, "chunk_size": 64}
    engine = locret.Engine(tiny_model("llama"), "streaming_llm", decode_interval=8, **settings)
    ids, mask = padded(lengths)
    output = engine.generate(ids, mask, return_dict_in_generate=True, **GREEDY)
    report = cache_of(output).report()
    assert report["budget"] == 150
    assert max(report["most_units"]) <= 150 + 8
