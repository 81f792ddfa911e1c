"""How many tokens of a prompt are read at a time where nobody says."""

import pytest
import torch

import locret
from locret.engine.budgets import ON_CPU, ON_GPU, SMALLEST, chosen_chunk
from locret.engine.plan import make_plan
from tests.test_plan import GIB, shape
from tests.tiny_models import prompt, tiny_heads, tiny_model


@pytest.mark.parametrize(
    ("kind", "room", "memory", "tokens"),
    [
        ("cpu", None, torch.inf, ON_CPU),
        ("cpu", 511, torch.inf, SMALLEST),
        ("cpu", 3, torch.inf, SMALLEST),
        ("cuda", None, 80 * GIB, ON_GPU),
        ("mps", None, torch.inf, ON_GPU),
        ("cuda", 4095, 80 * GIB, 2048),
        ("cuda", 8192, 4 * 100_000 * 1500, 1024),
        ("cuda", None, -1, SMALLEST),
    ],
)
def test_the_fastest_size_that_fits(kind, room, memory, tokens):
    assert chosen_chunk(kind, room, memory, token_bytes=100_000) == tokens


def test_heads_that_record_a_size_keep_it_unless_the_user_says_auto():
    model = tiny_model("llama")
    heads = tiny_heads(model, defaults={"budget": 24, "chunk_size": 9, "stabilizers": 2})

    def size(**given):
        return locret.Engine(model, heads=heads, **given).config.reading.chunk_size

    assert (size(), size(chunk_size="recorded"), size(chunk_size=7)) == (9, 9, 7)
    assert size(chunk_size=None) is None
    assert size(chunk_size="auto") == locret.Engine(model, "random").config.reading.chunk_size


def test_a_budget_leaves_the_window_room_for_a_chunk():
    model = tiny_model("llama", max_position_embeddings=1000)

    def size(budget, **given):
        return locret.Engine(model, "random", budget=budget, **given).config.reading.chunk_size

    assert (size(100), size(700), size(5000), size(None)) == (512, 256, 512, 512)
    assert (size("8x"), size("8x", positions="original")) == (256, 512)
    assert size("1GiB") == 256


@pytest.mark.parametrize(("memory", "tokens"), [(24, 4096), (17, 2048)])
def test_a_plan_shows_what_an_engine_would_read(memory, tokens):
    plan = make_plan(shape("llama-3.1-8b"), memory=memory * GIB, context=2**17)
    assert plan.chunk_size == tokens
    assert plan.chunk_bytes <= max(plan.memory - plan.weights_bytes - plan.heads_bytes, 0) / 4


def test_a_chosen_size_reads_as_the_same_number_given():
    model = tiny_model("llama")
    ids = prompt(700)
    kept = [
        locret.Engine(model, "keydiff", budget=30, chunk_size=size).prefill(ids).layers[0].keys
        for size in ("auto", ON_CPU)
    ]
    assert torch.equal(*kept)
