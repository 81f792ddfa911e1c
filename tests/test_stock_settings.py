"""What stock `generate` infers or takes from configurations, an engine does too: without a budget
the answers are the same."""

import pytest
import torch
from transformers import GenerationConfig

import locret
from locret.engine.engine import DEFAULT_NEW_TOKENS
from tests.test_batches import padded
from tests.tiny_models import prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture
def model():
    return tiny_model("llama")


def full_engine(model, **settings):
    return locret.Engine(model, "full", chunk_size=7, local_tokens=5, **settings)


def own(model, **settings):
    """A model with other generation settings of its own."""
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


# --- how long answers are ---


def new_tokens(engine, **kwargs):
    return engine.generate(prompt(10), **kwargs).shape[1] - 10


LENGTHS = [
    {"max_new_tokens": 30},
    {"max_length": 25},
    {"max_new_tokens": 7, "max_length": 25},
    {"max_length": 20},  # stock's default, but said
]


@pytest.mark.parametrize("said", LENGTHS, ids=str)
def test_the_models_own_length_counts_as_for_stock(said):
    model = own(tiny_model("llama"), **said)
    stock = model.generate(prompt(10))
    assert torch.equal(full_engine(model).generate(prompt(10)), stock)
    for more in ({"max_new_tokens": 5}, {"generation_config": GenerationConfig(max_new_tokens=5)}):
        assert torch.equal(
            full_engine(model).generate(prompt(10), **more), model.generate(prompt(10), **more)
        )
    if "max_new_tokens" in said:  # which takes precedence wherever it was said
        assert new_tokens(full_engine(model), max_length=13) == said["max_new_tokens"]


@pytest.mark.parametrize("said", LENGTHS, ids=str)
def test_a_configuration_passed_counts_as_for_stock(model, said):
    config = GenerationConfig(pad_token_id=0, **said)
    stock = model.generate(prompt(10), generation_config=config)
    answer = full_engine(model).generate(prompt(10), generation_config=config)
    assert torch.equal(answer, stock)


def test_answers_are_64_tokens_where_nobody_says(model):
    engine = full_engine(model)
    silent = GenerationConfig(do_sample=False)
    assert new_tokens(engine) == new_tokens(engine, generation_config=silent) == DEFAULT_NEW_TOKENS
    assert new_tokens(engine, generation_config=None) == DEFAULT_NEW_TOKENS
    own(model, min_length=3, repetition_penalty=1.2)
    assert new_tokens(engine) == DEFAULT_NEW_TOKENS


def test_max_length_counts_what_the_cache_has_read(model):
    engine, ids = full_engine(model), prompt(30)
    stock = model.generate(ids, max_length=36)
    for said in ({"max_length": 36}, {"generation_config": GenerationConfig(max_length=36)}, {}):
        if not said:
            own(model, max_length=36)
        cache = engine.prefill(ids[:, :20])
        assert torch.equal(engine.generate(ids[:, 20:], cache=cache, **said), stock[:, 20:])


@pytest.mark.parametrize("where", ["argument", "own"])
def test_max_length_does_not_count_a_question_read_in_front(where):
    model = tiny_model("llama")
    engine = locret.Engine(model, heads=tiny_heads(model, query_tokens=3), **SMALL)
    said = {"max_length": 36} if where == "argument" else {}
    if where == "own":
        own(model, max_length=36)
    assert engine.generate(prompt(30), **said).shape == (1, 36)
    cache = engine.prefill(prompt(30), query_ids=prompt(3, seed=1))
    assert engine.generate(prompt(2, seed=1), cache=cache, **said).shape == (1, 2 + 4)


# --- other settings ---


@pytest.mark.parametrize(
    "said",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "eos_token_id": 88},
        {"bad_words_ids": [[88], [17]]},
        {"num_beams": 3},
        {"prefill_chunk_size": 2},
        {"use_cache": False},
        {"use_cache": None},
        {"suppress_tokens": [88, 17]},
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["argument", "own", "configuration"])
def test_settings_from_everywhere(model, said, where):
    ids = prompt(30)
    beside = {name: value for name, value in said.items() if not name.startswith("use_cache")}
    expected = model.generate(ids, **GREEDY, **beside)
    given = {}
    if where == "argument":
        given = GREEDY | said
        if said == {"use_cache": False}:
            with pytest.raises(ValueError, match="use_cache=False leaves nothing to compress"):
                full_engine(model).generate(ids, **given)
            return
    elif where == "own":
        own(model, **said)
        given = GREEDY
    else:
        given = {"generation_config": GenerationConfig(pad_token_id=0, **GREEDY | said)}
    engine = full_engine(model)
    assert torch.equal(engine.generate(ids, **given), expected)
    if "num_beams" not in said:
        answer = engine.generate(ids[:, 20:], cache=engine.prefill(ids[:, :20]), **given)
        assert torch.equal(answer, expected[:, 20:])


def test_prefill_chunks_of_stock_with_padded_rows(model):
    (ids, mask), given = padded((30, 17, 3)), {"prefill_chunk_size": 2} | GREEDY
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(full_engine(model).generate(ids, mask, **given), expected)


@pytest.mark.parametrize("name", ["output_attentions", "position_ids"])
def test_what_would_be_left_out_without_a_word_is_refused(model, name):
    value = True if name == "output_attentions" else torch.arange(10)[None]
    with pytest.raises(ValueError, match=f"{name} does not work with a compressed cache"):
        full_engine(model).generate(prompt(10), **{name: value})
    if name == "output_attentions":
        full_engine(model).generate(prompt(10), output_attentions=False, **GREEDY)
        with pytest.raises(ValueError, match="output_attentions does not work"):
            full_engine(own(model, output_attentions=True)).generate(prompt(10))


# --- masks ---


LEFT = padded((30, 17, 3))


@pytest.mark.parametrize("where", ["argument", "own", "configuration"])
@pytest.mark.parametrize("eos", [None, 88, [88, 17], 0, [88, 0]], ids=str)
@pytest.mark.parametrize("pad", [0, None, 5], ids=str)
def test_padding_is_inferred_where_stock_does(model, pad, eos, where):
    ids = LEFT[0]
    own(model, pad_token_id=None, eos_token_id=None)
    special = {"pad_token_id": pad, "eos_token_id": eos}
    given = special if where == "argument" else {}
    if where == "own":
        own(model, **special)
    elif where == "configuration":
        given = {"generation_config": GenerationConfig(**special)}
    stock = model.generate(ids, max_new_tokens=8, **given)
    assert torch.equal(full_engine(model).generate(ids, max_new_tokens=8, **given), stock)


def test_padding_is_inferred_of_contexts_and_questions_too(model):
    engine, (ids, mask) = locret.Engine(model, "random", **SMALL), LEFT
    question, question_mask = (x.flip(0) for x in padded((5, 6, 4)))
    answers, paddings = [], []
    for masks in ((mask, question_mask), (None, None)):
        cache = engine.prefill(ids, masks[0])
        answers.append(engine.generate(question, masks[1], cache=cache, **GREEDY))
        paddings.append(cache.padding)
    assert torch.equal(*answers)
    assert paddings[0] == paddings[1]
    assert len(set(paddings[0])) == 3


def test_padding_after_other_tokens_is_refused_unless_a_mask_says_that_it_counts(model):
    engine = full_engine(model)
    within, after, nothing = prompt(30), prompt(30, 2), prompt(30, 2)
    within[0, 12], after[1, 25:], nothing[1] = 0, 0, 0
    for ids in (within, after, nothing):
        for call in (engine.prefill, engine.generate):
            with pytest.raises(ValueError, match=r"pad_token_id \(0\) after other.*attention_mask"):
                call(ids)
        ones = torch.ones_like(ids)
        expected = model.generate(ids, attention_mask=ones, **GREEDY)
        assert torch.equal(engine.generate(ids, ones, **GREEDY), expected)


def test_a_pad_token_given_as_a_tensor(model):
    own(model, pad_token_id=torch.tensor(0), eos_token_id=torch.tensor([88, 17]))
    stock = model.generate(LEFT[0], **GREEDY)
    assert torch.equal(full_engine(model).generate(LEFT[0], **GREEDY), stock)
