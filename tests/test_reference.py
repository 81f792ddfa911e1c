"""The engine against the naive twin of the paper's algorithm, at odd sizes."""

import pytest

import locret
from tests import reference
from tests.kept import kept_of
from tests.reference import Settings
from tests.tiny_models import distinct_prompt, tiny_heads, tiny_model

SIZES = [
    # prompt, settings: ragged last chunks, budgets of one and beyond the prompt, no stabilizers,
    # nothing but stabilizers, chunks larger than the budget and than the prompt
    (47, Settings(budget=13, chunk_size=9, stabilizers=4, local_tokens=5)),
    (61, Settings(budget=7, chunk_size=16, stabilizers=0, local_tokens=1)),
    (33, Settings(budget=11, chunk_size=1, stabilizers=10, local_tokens=3)),
    (40, Settings(budget=8, chunk_size=7, stabilizers=8, local_tokens=2)),
    (29, Settings(budget=1, chunk_size=5, stabilizers=0, local_tokens=4)),
    (29, Settings(budget=1, chunk_size=5, stabilizers=1, local_tokens=4)),
    (31, Settings(budget=10, chunk_size=100, stabilizers=3, local_tokens=2)),
    (23, Settings(budget=50, chunk_size=6, stabilizers=5, local_tokens=7)),
    (6, Settings(budget=3, chunk_size=2, stabilizers=1, local_tokens=9)),
]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "qwen2-hybrid"])
def test_engine_keeps_and_says_what_the_twin_does(family, kv_heads, attn):
    # Random rows of a large vocabulary, no token twice: no two scores are equal.
    model = tiny_model(
        family,
        attn_implementation=attn,
        vocab_size=512,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        hidden_size=32,
    )
    heads = tiny_heads(model)
    for length, settings in SIZES:
        ids = distinct_prompt(length, 512, seed=length)
        expected, expected_logits = reference.run(model, heads, ids, settings)
        engine = locret.Engine(model, heads=heads, **vars(settings))
        if length > settings.local_tokens:
            cache = engine.prefill(ids[:, : -settings.local_tokens])
            kept = [row for (row,) in kept_of(cache)]
            assert kept == expected, settings
        output = engine.generate(
            ids, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        assert (output.logits[0][0] - expected_logits).abs().max() < 1e-4, settings
