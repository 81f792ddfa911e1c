"""Source positions of a context that stays: the same numbers in fewer bytes, wherever it goes."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import locret
from locret.cache.cache import RetainedCache
from locret.cache.context import sequences_of
from locret.cache.sizing import packed_positions, positions_bytes, unpacked_positions
from tests.tiny_models import prompt, tiny_model

SMALL = {"budget": 40, "chunk_size": 16, "stabilizers": 0, "local_tokens": 5}
QUOTAS = [[1, 3], [2, 0.5]]


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 300),
    counts=st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2), min_size=1, max_size=3),
    seed=st.integers(0, 9),
)
def test_they_come_back(tokens, counts, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = tuple(tuple(min(n, tokens) for n in row) for row in counts)
    every = [
        torch.randperm(tokens, generator=generator)[:n].sort().values for row in counts for n in row
    ]
    positions = torch.cat(every).int()
    rows, each = sequences_of(counts, positions.device).rows(), []
    for own, row in zip(positions.split([row.total for row in rows]), rows, strict=True):
        each.append(packed_positions(own, row.owner, 2))
    assert torch.equal(unpacked_positions(each), positions)
    for row, count in zip(each, counts, strict=True):
        assert row.nbytes <= positions_bytes(sum(count), 2, tokens)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def positions_of(cache):
    return [[[x.tolist() for x in row] for row in each.source_positions] for each in cache.layers]


def is_closed(cache):
    return [layer.store.context.positions is not None for layer in cache.layers]


@pytest.mark.parametrize(
    ("quantization", "positions"), [(None, "compact"), ("rotated", "original")]
)
def test_a_context_takes_them_along(quantization, positions, model, tmp_path):
    options = SMALL | {"quantization": quantization, "positions": positions, "quotas": QUOTAS}
    engine = locret.Engine(model, "knorm", **options)
    evicting = locret.Engine(model, "knorm", decode_interval=8, **options)
    ids = prompt(150, batch=2)
    ids[1] = ids[1].roll(40)
    ids[1, :40] = 0
    mask = (ids > 0).long()
    cache, before = (each.prefill(ids, attention_mask=mask) for each in (engine, evicting))
    told = positions_of(before)
    assert is_closed(cache) == [True] * 2 and is_closed(before) == [False] * 2
    assert positions_of(cache) == told and cache.nbytes < before.nbytes
    alone = engine.prefill(ids[1:, 40:])
    assert positions_of(alone) == positions_of(cache.rows([1])) == [each[1:] for each in told]
    cache.save(tmp_path / "both")
    loaded = RetainedCache.load(tmp_path / "both", model)
    assert positions_of(loaded) == told and loaded.nbytes == cache.nbytes
    snapshot = cache.snapshot()
    text = engine.generate(ids[:, -1:], cache=cache, max_new_tokens=70, do_sample=False)
    for layer, of_layer in zip(positions_of(cache), told, strict=True):
        for read, row, of_row in zip((150, 110), layer, of_layer, strict=True):
            assert row == [kept + [*range(read, read + 70)] for kept in of_row]
    cache.restore(snapshot)
    assert positions_of(cache) == told
    again = engine.generate(ids[:, -1:], cache=loaded, max_new_tokens=3, do_sample=False)
    assert torch.equal(again, text[:, :4])


def test_contexts_that_were_saved_before_still_load(model, tmp_path):
    cache = locret.Engine(model, "knorm", **SMALL).prefill(prompt(150))
    cache.save(tmp_path / "old")
    file = tmp_path / "old" / "context.json"
    record = json.loads(file.read_text())
    for layer in record["lengths"]:
        del layer["closed"]
    file.write_text(json.dumps(record))
    loaded = RetainedCache.load(tmp_path / "old", model)
    assert is_closed(loaded) == [False] * 2 and positions_of(loaded) == positions_of(cache)
