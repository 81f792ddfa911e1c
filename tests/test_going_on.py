"""An answer goes on where it was cut: `generate` over its cache, without any new tokens."""

import pytest
import torch
from transformers import TextStreamer

import locret
from tests.test_batches import padded
from tests.tiny_models import prompt, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

SETTINGS = {"policy": "random", "budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"do_sample": False}


def engine_of(**changes):
    return locret.Engine(tiny_model("llama"), **SETTINGS | changes)


def nothing(rows=1):
    return torch.empty(rows, 0, dtype=torch.long)


@pytest.mark.parametrize(
    "settings", [{}, {"positions": "original"}, {"decode_interval": 3}], ids=str
)
@pytest.mark.parametrize("length", [1, 5, 60])
@pytest.mark.parametrize("rows", [1, 2])
def test_an_answer_in_two_calls_is_that_of_one(settings, length, rows, recwarn):
    engine, ids = engine_of(**settings), prompt(length, batch=rows)
    whole = engine.generate(ids, max_new_tokens=12, **GREEDY)
    begun = engine.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    cache = locret.model.hooks.cache_of(begun)
    more = engine.generate(nothing(rows), cache=cache, max_new_tokens=7, **GREEDY)
    assert torch.equal(torch.cat([begun.sequences, more], dim=1), whole)
    assert not recwarn.list


def test_rows_of_different_lengths_go_on():
    engine, (ids, mask) = engine_of(), padded((40, 9))
    whole = engine.generate(ids, mask, max_new_tokens=12, **GREEDY)
    begun = engine.generate(ids, mask, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    cache = locret.model.hooks.cache_of(begun)
    more = engine.generate(nothing(2), cache=cache, max_new_tokens=7, **GREEDY)
    assert torch.equal(torch.cat([begun.sequences, more], dim=1), whole)


def test_what_goes_on_is_streamed_alone():
    engine, tokenizer, shown = engine_of(), tiny_tokenizer(), []
    cache = engine.prefill(prompt(40))
    engine.generate(prompt(3), cache=cache, max_new_tokens=5, **GREEDY)

    class Streamer(TextStreamer):
        def put(self, value):
            shown.append(value.flatten().tolist())

        def end(self):
            pass

    streamer = Streamer(tokenizer)
    more = engine.generate(nothing(), cache=cache, max_new_tokens=7, streamer=streamer, **GREEDY)
    assert shown[0] == []
    assert sum(shown, []) == more[0].tolist()


def test_a_context_without_an_answer_cannot_go_on():
    engine = engine_of()
    cache = engine.prefill(prompt(40))
    with pytest.raises(ValueError, match="the cache has no answer to go on with"):
        engine.generate(nothing(), cache=cache, **GREEDY)
    with pytest.raises(ValueError, match="at least one token"):
        engine.generate(nothing(), **GREEDY)
