"""How many tokens of a prompt are read at a time where nobody says."""

import pytest
import torch

import locret
from locret.engine.chunk_size import ON_CPU, ON_GPU, ON_GPU_PACKED, SMALLEST, chosen_chunk
from locret.engine.plan import as_text, make_plan
from tests.test_plan import GIB, shape
from tests.tiny_models import prompt, tiny_heads, tiny_model


@pytest.mark.parametrize(
    ("kind", "packs", "room", "memory", "tokens"),
    [
        ("cpu", False, None, torch.inf, ON_CPU),
        ("cpu", True, 511, torch.inf, SMALLEST),
        ("cpu", False, 3, torch.inf, SMALLEST),
        ("cuda", False, None, 80 * GIB, ON_GPU),
        ("cuda", True, None, 80 * GIB, ON_GPU_PACKED),
        ("mps", False, None, torch.inf, ON_GPU),
        ("cuda", False, 4095, 80 * GIB, 2048),
        ("cuda", True, 8191, 80 * GIB, 4096),
        ("cuda", False, 8192, 4 * 100_000 * 1500, 1024),
        ("cuda", True, None, -1, SMALLEST),
    ],
)
def test_the_fastest_size_that_fits(kind, packs, room, memory, tokens):
    assert chosen_chunk(kind, packs, room, memory, token_bytes=100_000) == tokens


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


@pytest.mark.parametrize(
    ("memory", "tokens", "packed"), [(24, 4096, 8192), (18, 4096, 4096), (17, 2048, 2048)]
)
def test_a_plan_shows_what_an_engine_would_read(memory, tokens, packed):
    plan = make_plan(shape("llama-3.1-8b"), memory=memory * GIB, context=2**17)
    assert (plan.chunk_size, plan.packed_chunk_size) == (tokens, packed)
    for taken in (plan.chunk_bytes, plan.packed_chunk_bytes):
        assert taken <= max(plan.memory - plan.weights_bytes - plan.heads_bytes, 0) / 4
    assert ("8,192 where units are packed" in as_text(plan, "a model")) == (packed > tokens)
    of_short = make_plan(shape("llama-3.1-8b"), memory=memory * GIB, context=2000)
    assert "where units are packed" not in as_text(of_short, "a model")


def test_a_chosen_size_reads_as_the_same_number_given():
    model = tiny_model("llama")
    ids = prompt(700)
    kept = [
        locret.Engine(model, "keydiff", budget=30, chunk_size=size).prefill(ids).layers[0].keys
        for size in ("auto", ON_CPU)
    ]
    assert torch.equal(*kept)
