"""A tiny engine, and services of it that are closed after each test."""

import pytest
import torch

import locret
from locret.serve.service import Service
from tests.tiny_models import prompt, tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
WAIT = 60  # seconds, for what comes in far less


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def engine(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    return locret.Engine(model, heads=tiny_heads(model), **SMALL)


@pytest.fixture
def twin(tokenizer):
    """An engine that answers alike, for what is expected: services own theirs."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    return locret.Engine(model, heads=tiny_heads(model), **SMALL)


def rows_of_calls(engine, monkeypatch):
    """Rows of every call of `engine.generate` from now on."""
    rows, generate = [], engine.generate

    def spied(input_ids, *args, **kwargs):
        rows.append(len(input_ids))
        return generate(input_ids, *args, **kwargs)

    monkeypatch.setattr(engine, "generate", spied)
    return rows


@pytest.fixture
def batches(engine, monkeypatch):
    return rows_of_calls(engine, monkeypatch)


@pytest.fixture
def make(engine, tokenizer):
    """Makes services of the engine."""
    made = []

    def of(**settings):
        made.append(Service(engine, tokenizer, **settings))
        return made[-1]

    yield of
    for service in made:
        service.close(drain=False, seconds=WAIT)


@pytest.fixture
def ids(tokenizer):
    """Random tokens by number and seed, none of them special."""

    def of(length, seed=0):
        low = 5
        return [
            low + t % (len(tokenizer) - low) for t in prompt(length, 1, seed, 2**20)[0].tolist()
        ]

    return of


@pytest.fixture
def expected(twin, tokenizer):
    """The text of a greedy answer by the engine alone."""

    def of(tokens, cache=None, new=8, **given):
        given = {"do_sample": False} | given
        one = torch.tensor([tokens])
        output = twin.generate(one, torch.ones_like(one), cache=cache, max_new_tokens=new, **given)
        return tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)

    return of


def text_of(answer):
    """The whole text of an answer, and its end."""
    *pieces, end = answer.events(WAIT)
    return "".join(piece.text for piece in pieces), end
