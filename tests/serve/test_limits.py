"""What is said to fit can be answered, and what is one token longer is refused."""

import pytest

import locret
from locret.serve.requests import TooLong
from locret.serve.service import Limits
from tests.serve.conftest import SMALL
from tests.tiny_models import tiny_heads, tiny_model


def limits(**settings):
    model = tiny_model("llama", max_position_embeddings=100)
    heads = tiny_heads(model)
    memory = settings.pop("memory", None)
    return Limits(locret.Engine(model, heads=heads, **SMALL | settings), memory)


@pytest.mark.parametrize(
    ("settings", "prompt", "context", "most"),
    [
        ({}, 10**6, None, 75),  # 20 units and 5 local tokens
        ({}, 7, None, 93),
        ({}, 10, 50, 70),
        ({"budget": None}, 60, None, 40),
        ({"positions": "original"}, 60, None, 40),
        ({"positions": "original"}, 10, 50, 40),
        ({"budget": [10, 30]}, 10**6, None, 65),  # of the fullest layer
        ({"budget": 0.25}, 125, None, 65),
        ({"query_aware": True}, 10**6, None, 79),
        ({"decode_interval": 4}, 10**6, None, 10**6),
    ],
    ids=str,
)
def test_answers_fill_the_window(settings, prompt, context, most):
    of = limits(**settings)
    assert of.answer_tokens(prompt, context, None, 10**6) == most
    assert of.answer_tokens(prompt, context, None, 9) == 9
    assert of.answer_tokens(prompt, context, most, 9) == most
    if most < 100:
        with pytest.raises(TooLong, match=f"an answer of {most} tokens would fit"):
            of.answer_tokens(prompt, context, most + 1, 9)


def test_what_would_fit_is_said():
    of = limits(budget=None)
    with pytest.raises(TooLong, match="a prompt of 90 tokens would fit, or an answer of 5 tokens"):
        of.answer_tokens(95, None, 10, 9)
    with pytest.raises(TooLong, match="send a shorter one"):
        of.answer_tokens(100, None, 200, 9)
    with pytest.raises(TooLong, match="a context of 98 tokens would fit"):
        of.check_context(99)
    of.check_context(98)
    limits().check_context(10**6)


def test_chunks_stay_within_the_window():
    of = limits(chunk_size=90)
    with pytest.raises(TooLong, match="a context of 100 tokens would fit"):
        of.check_context(101)
    with pytest.raises(TooLong):
        limits(chunk_size=None).check_context(101)


def test_memory_comes_from_the_plan():
    small, large = limits(memory=2**20), limits(memory=2**30)
    assert 0 < small.most_units < large.most_units
    assert limits(memory=1000).most_units == 0
    with pytest.raises(TooLong, match="memory for 0 units"):
        limits(memory=1000).check_context(5)
    assert limits(memory=2**30, quantization="kivi").most_units > large.most_units


def test_requests_that_keep_unequal_heads_take_what_these_hold_on_average():
    of = limits(budget=[10, 30])
    assert (of.needed(3, 50, 4), of.needed(3, 50, 4, mean=True)) == (37, 27)
    assert (of.needed(60, None, 4), of.needed(60, None, 4, mean=True)) == (39, 29)
