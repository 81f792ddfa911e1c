"""A float32 model under `torch.autocast` answers through an engine as it does by itself."""

import pytest
import torch

import locret
from locret.model.hooks import cache_of
from locret.policies import POLICIES
from locret.quantization import SCHEMES
from tests.test_batches import padded
from tests.tiny_models import FAMILIES, SLIDING, prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
ANSWER = {
    "max_new_tokens": 6,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
PACKING = sorted(name for name, scheme in SCHEMES.items() if scheme.packs)
NEAR = 0.05  # bfloat16 alone moves logits by up to 0.04 of them


def autocast(dtype=torch.bfloat16, enabled=True):
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def engine_of(model, policy="locret", **settings):
    heads = tiny_heads(model) if policy == "locret" else None
    return locret.Engine(model, policy, heads=heads, **SMALL | settings)


def logits_of(output, steps=3):
    """[steps, B, V] float32."""
    return torch.stack(output.logits)[:steps].float()


def distance(output, other, steps=1):
    one, other = logits_of(output, steps), logits_of(other, steps)
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", FAMILIES + SLIDING)
def test_without_a_budget_as_stock_generate(family, positions):
    model, ids = tiny_model(family), prompt(60)
    for chunk_size in (None, 7):
        engine = locret.Engine(
            model,
            budget=None,
            policy="random",
            chunk_size=chunk_size,
            local_tokens=5,
            positions=positions,
            longrope="by_length",
        )
        with autocast():
            output, stock = engine.generate(ids, **ANSWER), model.generate(ids, **ANSWER)
        assert output.sequences.dtype == stock.sequences.dtype
        assert distance(output, stock) < NEAR
        assert {layer.keys.dtype for layer in cache_of(output).layers} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_either_dtype_and_attention(dtype, attn):
    model = tiny_model("llama", attn_implementation=attn)
    engine = engine_of(model, "random", budget=None)
    ids, mask = padded((40, 23, 4))
    with autocast(dtype):
        output = engine.generate(ids, mask, **ANSWER)
        stock = model.generate(ids, attention_mask=mask, **ANSWER)
    assert distance(output, stock) < NEAR
    assert cache_of(output).layers[0].keys.dtype == dtype


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("decode_interval", [None, 3])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy(model, policy, decode_interval, positions):
    if POLICIES[policy].rereads:
        decode_interval = None  # which it refuses
    settings = {"decode_interval": decode_interval, "positions": positions}
    engine = engine_of(model, policy, **settings)
    whole = engine_of(model, policy, budget=90, **settings)
    with autocast():
        cache = engine.prefill(prompt(60))
        for seed in (1, 2):
            engine.generate(prompt(4, seed=seed), cache=cache, **ANSWER)
        kept = whole.generate(prompt(60), **ANSWER)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    if engine.config.reading.decode_interval:  # else they are dropped
        assert cache.layers[0].scores[0][0].dtype == torch.float32
    assert distance(kept, whole.generate(prompt(60), **ANSWER)) < NEAR


@pytest.mark.parametrize("options", [{"merging": "similar"}, {"recall": {}}])
def test_merging_and_recall(model, options):
    with autocast():
        output = engine_of(model, **options).generate(prompt(60), **ANSWER)
    assert output.sequences.shape == (1, 66)


@pytest.mark.parametrize("rows", [(60, 60), (60, 33, 12)])
@pytest.mark.parametrize("name", PACKING)
def test_few_bits(name, rows):
    model = tiny_model("llama", num_hidden_layers=4)
    scheme = {"name": name, "bits": 8, "group": 4, "residual": 3}
    engine = engine_of(model, "streaming_llm", quantization=scheme)
    plain = engine_of(model, "streaming_llm")
    (ids, mask), (question, question_mask) = padded(rows), padded([6, 4, 5][: len(rows)])
    with autocast():
        answers = []
        for each in (engine, plain):
            cache = each.prefill(ids, mask)
            each.generate(prompt(3, len(rows)), cache=cache, max_new_tokens=30, do_sample=False)
            cache = each.prefill(ids, mask)
            answers.append(each.generate(question, question_mask, cache=cache, **ANSWER))
    assert distance(*answers) < 4 * NEAR  # fp8 rounds more than the others


@pytest.mark.parametrize("scheme", [None, {"name": "kivi", "bits": 8, "group": 4, "residual": 3}])
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("first", [True, False])
def test_turned_on_or_off_between_context_and_question(model, first, positions, scheme):
    engine = engine_of(model, positions=positions, quantization=scheme)
    question = prompt(4, seed=1)
    with autocast(enabled=first):
        cache = engine.prefill(prompt(60))
        untouched = cache.snapshot()
        expected = engine.generate(question, cache=cache, **ANSWER)
        cache.restore(untouched)
    with autocast(enabled=not first):
        output = engine.generate(question, cache=cache, **ANSWER)
    assert distance(output, expected) < NEAR
    assert cache.layers[0].keys.dtype == (torch.bfloat16 if first else torch.float32)
    with autocast(enabled=first):
        assert engine.generate(question, cache=cache, **ANSWER).sequences.shape == (1, 10)


@pytest.mark.parametrize("first", [True, False])
def test_turned_on_or_off_while_units_are_evicted_is_refused(model, first):
    engine = engine_of(model, decode_interval=3)
    with autocast(enabled=first):
        cache = engine.prefill(prompt(60))
    with autocast(enabled=not first), pytest.raises(ValueError, match="autocast was turned on or"):
        engine.generate(prompt(4, seed=1), cache=cache, **ANSWER)
    with autocast(enabled=first):
        engine.generate(prompt(4, seed=1), cache=cache, **ANSWER)


def test_turns_are_the_whole_conversation(model):
    engine = engine_of(model, "full")
    conversation = prompt(40, seed=1)
    with autocast():
        cache = engine.prefill(conversation)
        for turn in range(3):
            question = prompt(6 + turn, seed=10 + turn)
            answer = engine.generate(question, cache=cache, **ANSWER)
            conversation = torch.cat([conversation, question], dim=1)
            assert distance(answer, model.generate(conversation, **ANSWER)) < NEAR
            conversation = torch.cat(
                [conversation, answer.sequences[:, question.shape[1] :]], dim=1
            )


def test_saved_and_loaded(model, tmp_path):
    engine = engine_of(model)
    with autocast():
        cache = engine.prefill(prompt(60))
        cache.save(tmp_path / "context")
        loaded = locret.RetainedCache.load(tmp_path / "context", model)
        expected = engine.generate(prompt(4, seed=1), cache=cache, **ANSWER)
        given = engine.generate(prompt(4, seed=1), cache=loaded, **ANSWER)
    assert torch.equal(logits_of(given), logits_of(expected))
