"""The MInference baseline: what it is asked to look at, and why it is refused."""

import sys
import types

import pytest
import torch

import locret
from locret.model import backends as sparse_prefill
from locret.model.backends import attend, available
from tests.tiny_models import prompt, tiny_model

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def masked(query, key, value, columns, distances):
    """What the kernel computes, over a mask: chosen columns, and blocks of 64 x 64 that a chosen
    diagonal touches would be seen too; here only the diagonals themselves."""
    length = query.shape[2]
    slot = torch.arange(length)
    distance = slot[:, None] - slot
    seen = torch.zeros(*query.shape[:2], length, length, dtype=torch.bool)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            seen[b, h][:, columns[b, h]] = True
            seen[b, h] |= torch.isin(distance, distances[b, h])
    seen &= distance >= 0
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value


@pytest.fixture
def package(monkeypatch):
    """A package with that name whose kernel runs anywhere; it notes what it was asked."""
    module, asked = types.ModuleType("minference"), []

    def kernel(query, key, value, columns, distances):
        assert query.shape == key.shape == value.shape
        asked.append((columns, distances))
        return masked(query, key, value, columns, distances)

    module.vertical_slash_sparse_attention = kernel
    module.__spec__ = types.SimpleNamespace(name="minference")
    monkeypatch.setitem(sys.modules, "minference", module)
    return asked


def inputs(length, group=2, heads=2, size=8):
    torch.manual_seed(length)
    query = torch.randn(2, heads * group, length, size)
    key, value = torch.randn(2, 2, heads, length, size)
    return query, key, value


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("length", [64, 65, 150])
def test_looking_at_everything_is_full_attention(package, length, group):
    query, key, value = inputs(length, group)
    expected = attend(query, key, value, 0.3, "eager")
    for settings in ({}, {"vertical": length, "slash": 1}, {"vertical": 1, "slash": length}):
        found = sparse_prefill.attend_sparsely(query, key, value, 0.3, **settings)
        torch.testing.assert_close(found, expected)


def test_what_is_looked_at_is_what_the_last_queries_saw(package):
    length, count = 200, 120
    query, key, value = inputs(length)
    sparse_prefill.attend_sparsely(query, key, value, 0.3, vertical=count, slash=count)
    assert len(package) == key.shape[1]
    for head, (columns, distances) in enumerate(package):
        for b in range(2):
            for g in range(2):
                by_column, by_distance = torch.zeros(length), torch.zeros(length)
                for t in range(length - 64, length):
                    logits = key[b, head, : t + 1] @ query[b, 2 * head + g, t] * 0.3
                    weights = logits.softmax(dim=0)
                    by_column[: t + 1] += weights
                    by_distance[: t + 1] += weights.flip(0)
                by_column[:30] = by_distance[:100] = torch.inf
                for found, twin in ((columns, by_column), (distances, by_distance)):
                    assert set(found[b, g].tolist()) == set(twin.topk(count).indices.tolist())


def test_only_a_prompt_read_at_once_is_sparse(package):
    query, key, value = inputs(150)
    for part in (query[:, :, -1:], query[:, :, -64:]):  # a step, and tokens after a context
        found = attend(part, key, value, 0.3, "minference")
        torch.testing.assert_close(found, attend(part, key, value, 0.3, "sdpa"))
    short = [x[:, :, :63] for x in (query, key, value)]
    torch.testing.assert_close(attend(*short, 0.3, "minference"), attend(*short, 0.3, "sdpa"))
    assert not package
    attend(query, key, value, 0.3, "minference")
    assert len(package) == 2


def test_an_engine_prefills_with_it(package, monkeypatch):
    monkeypatch.setattr(sparse_prefill, "why_not_sparse", lambda *args: None)
    model, ids = tiny_model("llama"), prompt(120)
    settings = {"chunk_size": None, "local_tokens": 5}
    sparse = locret.Engine(model, "full", backend="minference", **settings)
    full = locret.Engine(model, "full", **settings)
    answers = [e.generate(ids, max_new_tokens=8, do_sample=False) for e in (sparse, full)]
    assert torch.equal(*answers)  # a short prompt is looked at as a whole
    assert len(package) == 2 * model.config.num_key_value_heads - 2  # the last layer only stores


# --- refusals ---


@pytest.mark.parametrize(
    "settings", [{"policy": "keydiff", "chunk_size": None}, {"policy": "full", "chunk_size": 64}]
)
def test_it_goes_with_the_full_cache_read_at_once(settings):
    with pytest.raises(ValueError, match="policy='full' and chunk_size=None"):
        locret.Engine(tiny_model("llama"), backend="minference", **settings)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "minference", None)
    monkeypatch.setattr(sparse_prefill.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'minference' does not work here: the package minference"):
        locret.Engine(tiny_model("llama"), "full", backend="minference", chunk_size=None)


def test_what_it_needs(package):
    assert "needs a CUDA device and half precision" in available("minference", CPU, torch.half, 64)
    assert "the model is torch.float32" in available("minference", CUDA, torch.float32, 64)
    assert "at most 128 channels; these have 256" in available(
        "minference", CUDA, torch.bfloat16, 256
    )
    assert available("minference", CUDA, torch.bfloat16, 64) is None


def test_a_package_that_cannot_be_imported_is_named_with_its_error(package):
    del sys.modules["minference"].vertical_slash_sparse_attention
    reason = available("minference", CUDA, torch.bfloat16, 64)
    assert "cannot be imported beside torch" in reason
    assert "ImportError: cannot import name 'vertical_slash_sparse_attention'" in reason
