"""What `python -m locret plan` says, against known shapes and against a cache that was filled."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

import locret
from benchmarks.shapes import SHAPES
from locret.cache.sizing import Sizing
from locret.cli import main
from locret.engine.plan import PLANNED, as_text, make_plan
from locret.heads.quotas import quotas_of
from locret.model.backbone import Backbone
from locret.quantities import format_bytes, parse_bytes, parse_tokens
from tests.tiny_models import prompt, tiny_config, tiny_heads, tiny_model

GIB = 2**30
CONTEXT = 128 * 1024


def shape(name):
    settings = dict(SHAPES[name])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def by_name(plan):
    return {(scheme.name, scheme.bits): scheme for scheme in plan.schemes}


def test_llama_31_8b_at_128k():
    plan = make_plan(shape("llama-3.1-8b"), memory=24 * GIB, context=CONTEXT)
    schemes = by_name(plan)
    assert plan.parameters == 8_030_261_248
    assert plan.weights_bytes == 16_060_522_496
    assert plan.heads_bytes == 2 * 32 * 1024 * (6144 + 8)
    packed = [("kivi", 8), ("kivi", 4), ("kivi", 2), ("fp8", 8)]
    packed += [("rotated", bits) for bits in (8, 4, 3, 2)]
    assert list(schemes) == [("none", 16), *packed]
    starts = 32 * 8 * 4 / 64  # of every run, one int32
    assert [s.bytes_per_token for s in plan.schemes] == [
        131072,
        69632 + starts,
        36864 + starts,
        20480 + starts,
        32 * 8 * (256 + 8 + 2) + starts,
        *(32 * 8 * (256 * bits / 8 + 4 + 256 / 64) + starts for bits in (8, 4, 3, 2)),
    ]
    bookkeeping = 32 * 8 * 4 * CONTEXT
    plain, kivi = schemes["none", 16], {bits: schemes["kivi", bits] for bits in (8, 4, 2)}
    assert plain.context_bytes == 16 * GIB + bookkeeping
    assert 4.5 * GIB < kivi[4].context_bytes - bookkeeping < 1.07 * 4.5 * GIB
    assert 0 < plain.budget < kivi[8].budget < CONTEXT
    assert kivi[2].budget == CONTEXT  # 24 GiB hold all of it in 2 bits
    assert plain.compression == CONTEXT / plain.budget


def test_tied_weights_are_counted_once():
    tied, untied = (
        make_plan(tiny_config("llama", tie_word_embeddings=tie), memory=GIB, context=100)
        for tie in (True, False)
    )
    assert untied.parameters - tied.parameters == 128 * 64


def test_the_cache_is_as_large_as_said():
    model = tiny_model("llama")
    engine = locret.Engine(
        model, heads=tiny_heads(model), budget=24, chunk_size=16, stabilizers=4, local_tokens=1
    )
    cache = engine.prefill(prompt(70))
    sizing = Sizing.of(PLANNED[0], Backbone(model).geometry, 4)
    assert sizing.cache_bytes([24, 24], 70) == cache.nbytes


def test_everything_is_within_the_memory():
    config = shape("llama-3.1-8b")
    plan = make_plan(config, memory=20 * GIB, context=10 * CONTEXT, new_tokens=500)
    fixed = plan.weights_bytes + plan.heads_bytes + plan.chunk_bytes + plan.reserve_bytes
    assert fixed + plan.left_bytes == plan.memory
    for scheme, planned in zip(PLANNED, plan.schemes, strict=True):
        sizing = Sizing.of(scheme, plan.geometry, 2)
        held = sizing.cache_bytes([planned.budget + 600] * 32)
        assert 0.5 * plan.left_bytes < held < plan.left_bytes


@given(
    memory=st.integers(1, 2**34),
    context=st.integers(1, 2**22),
    chunk=st.integers(1, 2**16),
    width=st.integers(0, 64),
)
def test_more_memory_never_means_a_smaller_budget(memory, context, chunk, width):
    settings = {"context": context, "chunk_size": chunk, "head_width": width}
    small, large = (
        make_plan(tiny_config("llama"), memory=size, **settings) for size in (memory, 2 * memory)
    )
    budgets = [scheme.budget for scheme in small.schemes if scheme.name == "kivi"]
    assert budgets == sorted(budgets)
    assert all(
        a.budget <= b.budget <= context for a, b in zip(small.schemes, large.schemes, strict=True)
    )


def test_without_heads_and_in_float32():
    plan = make_plan(
        tiny_config("qwen3"), memory=GIB, context=512, dtype=torch.float32, head_width=0
    )
    assert plan.heads_bytes == 0
    assert plan.schemes[0].bits == 32
    assert plan.weights_bytes == 4 * plan.parameters


def test_what_does_not_fit_is_said():
    text = as_text(make_plan(shape("llama-3.1-8b"), memory=8 * GIB, context=CONTEXT), "llama")
    assert "Nothing fits" in text
    assert "-" in text.splitlines()[-3]


def test_a_window_that_is_too_short_is_said():
    config = tiny_config("llama")
    assert "window" not in as_text(make_plan(config, memory=GIB, context=1000), "tiny")
    assert "1,024 positions" in as_text(make_plan(config, memory=GIB, context=5000), "tiny")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"memory": 0}, "memory is 0"),
        ({"context": 0}, "context is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"new_tokens": -1}, "new_tokens is -1"),
        ({"head_width": -1}, "head_width is -1"),
        ({"context": 2**63}, "context is 9223372036854775808; expected at least 1, and at most"),
        ({"new_tokens": 10**30}, "new_tokens is 1000"),
        ({"memory": 10**400}, "memory is 1000"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        make_plan(tiny_config("llama"), **{"memory": GIB, "context": 100} | settings)


def test_an_unsupported_architecture_is_refused():
    config = AutoConfig.for_model("gpt2")
    with pytest.raises(ValueError, match="gpt2"):
        make_plan(config, memory=GIB, context=100)


def test_the_command_needs_only_a_config(tmp_path, capsys):
    shape("llama-3.1-8b").save_pretrained(tmp_path)
    args = ["plan", "--model", str(tmp_path), "--memory", "24GiB", "--context", "128K"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "8.03B parameters" in out
    assert "131,072" in out
    for words in ("none", "auto", "recorded"):
        assert main([*args, "--chunk-size", words]) == 0
        assert (capsys.readouterr().out == out) == (words != "none")
    assert main([*args, "--json", "--chunk-size", "1024", "--dtype", "float16"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["context"], plan["chunk_size"], plan["dtype"]) == (CONTEXT, 1024, "float16")
    assert plan["schemes"][0]["bytes_per_token"] == 131072
    with pytest.raises(SystemExit):
        main([*args[:3], "--memory", "lots", "--context", "128K"])
    assert "24GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("1.5kib", 1536), ("7", 7), ("2 TiB", 2**41)],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "tokens"), [("128K", CONTEXT), ("1m", 2**20), ("4096", 4096)])
def test_numbers_of_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "24 parsecs", "0", "1e3", "nan", "1.5", "9" * 400]
)
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match="memory"):
        parse_bytes(text)
    with pytest.raises(ValueError, match="tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (-GIB, "-1.0 GiB")]
)
def test_sizes_are_readable(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2"])
def test_windows_of_sliding_layers_are_counted(family):
    config = tiny_config(family)
    planned = make_plan(config, memory=GIB, context=10_000, dtype=torch.float32)
    model = tiny_model(family)
    cache = locret.Engine(model, "full").prefill(prompt(400))
    sliding = [layer for layer in cache.layers if layer.window]
    assert planned.sliding_layers == len(sliding) > 0
    assert planned.sliding_bytes == sum(layer.nbytes for layer in sliding)
    text = as_text(planned, "tiny")
    assert f"{len(cache.layers)} layers" in text and f"of {len(sliding)} sliding layers" in text


def test_unequal_heads_keep_as_much_together_and_the_layer_at_work_may_need_more():
    given = {"memory": 24 * GIB, "context": CONTEXT}
    equal = make_plan(shape("llama-3.1-8b"), **given)
    heads = [[0.25, 1.75] * 4] * 32
    alike = make_plan(shape("llama-3.1-8b"), **given, quotas=quotas_of(heads))
    assert alike.schemes == equal.schemes  # layers are
    assert equal.spread is None and "from 0.25 to 1.75" in as_text(alike, "")
    layers = [[0.5] * 8] * 16 + [[1.5] * 8] * 16
    plan = make_plan(shape("llama-3.1-8b"), **given, quotas=quotas_of(layers))
    plain = plan.schemes[0]
    assert plain.budget < equal.schemes[0].budget and plain.units == 256 * plain.budget
    with pytest.raises(ValueError, match="quotas are for 1 layers"):
        make_plan(shape("llama-3.1-8b"), **given, quotas=quotas_of([[1.0] * 8]))
