"""Rotation at slots, against what each architecture does itself."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from locret.kernels import rotate_at_slots
from locret.model.backbone import Backbone
from locret.model.rotary import _TABLES_KEPT, Rotary, longrope_switch
from tests.tiny_models import FAMILIES, HEAD_SIZE, PHI3_WINDOW, tiny_model


def stock_rotation(model, x, start, layer_idx=0):
    """`x` rotated as the architecture's attention layers do, by their own code."""
    module = __import__(type(model.model.layers[0].self_attn).__module__, fromlist=["x"])
    positions = torch.arange(start, start + x.shape[2])[None]
    by_type = isinstance(model.model.rotary_emb.rope_type, dict)
    which = [model.config.layer_types[layer_idx]] if by_type else []
    cos, sin = model.model.rotary_emb(x, positions, *which)
    size = cos.shape[-1] * (2 if model.config.model_type == "gpt_oss" else 1)
    rotated, _ = module.apply_rotary_pos_emb(x[..., :size], x[..., :size], cos, sin)
    return torch.cat([rotated, x[..., size:]], dim=-1)


def random_heads(length, heads=3, size=HEAD_SIZE):
    return torch.randn(2, heads, length, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_is_the_architectures(family):
    model = tiny_model(family)
    backbone = Backbone(model, "by_length")
    for layer in backbone.layers:
        for start, length in ((0, 1), (0, 9), (5, 7), (90, 3)):
            if layer.rotary is None:
                continue
            x = random_heads(length)
            expected = stock_rotation(model, x, start, layer.layer_idx)
            assert torch.equal(layer.rotary.rotate(x, (start,), (50,)), expected)
            assert start == 0 and length == 1 or not torch.equal(expected, x)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_of_the_fused_kernel_turn_alike(family):
    x = random_heads(7)
    for layer in Backbone(tiny_model(family)).layers:
        rotary = layer.rotary
        if rotary is not None:
            cos, sin = rotary.cos_sin((4,), 7, (50,), x)
            tables = rotary.pattern.tables(cos, sin)
            turned = rotate_at_slots(x, *tables, rotary.pattern.pairing)
            assert (turned - rotary.rotate(x, (4,), (50,))).abs().max() < 1e-6


@pytest.mark.parametrize("partial", [0.25, 0.5, 1.0])
def test_partial_rotation_leaves_the_rest_of_a_head_alone(partial):
    model = tiny_model("glm", head_dim=16, partial_rotary_factor=partial)
    x = random_heads(6, size=16)
    turned = Backbone(model).rotary.rotate(x, (3,), (9,))
    size = int(16 * partial)
    assert torch.equal(turned[..., size:], x[..., size:])
    assert not torch.equal(turned[..., :size], x[..., :size])
    assert torch.equal(turned, stock_rotation(model, x, 3))


@pytest.mark.parametrize("partial", [0.5, 1.0])
def test_partial_rotation_of_phi3(partial):
    model = tiny_model(
        "phi3",
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial
        },
        partial_rotary_factor=partial,
    )  # fmt: skip
    x = random_heads(6)
    turned = Backbone(model).rotary.rotate(x, (3,), (9,))
    assert torch.equal(turned, stock_rotation(model, x, 3))
    assert torch.equal(turned[..., 4:], x[..., 4:]) == (partial == 0.5)


def test_only_relative_slots_matter():
    rotary = Backbone(tiny_model("llama")).rotary
    query, key = random_heads(1), random_heads(5)
    logits = [
        rotary.rotate(query, (start + 5,), (9,))
        @ rotary.rotate(key, (start,), (9,)).transpose(2, 3)
        for start in (0, 17)
    ]
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_a_range_in_parts_is_the_range():
    rotary, x = Backbone(tiny_model("llama")).rotary, random_heads(20)
    parts = [rotary.rotate(x[:, :, i : i + 1], (i,), (20,)) for i in range(20)]
    assert torch.equal(torch.cat(parts, dim=2), rotary.rotate(x, (0,), (20,)))


def test_dtype_is_kept_and_tables_do_not_mix_dtypes():
    rotary, x = Backbone(tiny_model("llama")).rotary, random_heads(4)
    first = rotary.rotate(x, (0,), (4,))
    for dtype in (torch.bfloat16, torch.float16):
        assert rotary.rotate(x.to(dtype), (0,), (4,)).dtype == dtype
    assert torch.equal(rotary.rotate(x, (0,), (4,)), first)


def test_nothing_of_the_rotary_module_is_changed():
    model = tiny_model("phi3")
    module = model.model.rotary_emb
    before = {name: copy.deepcopy(v) for name, v in vars(module).items() if name != "config"}
    rotary = Backbone(model, "long").rotary
    rotary.rotate(random_heads(300), (0,), (300,))
    after = vars(module)
    assert after.keys() == before.keys() | {"config"}
    assert torch.equal(module.inv_freq, before["_buffers"]["inv_freq"])
    assert module.rope_type == "longrope"


def test_more_ranges_than_tables_are_kept_give_the_same_every_time():
    rotary, x = Backbone(tiny_model("llama")).rotary, random_heads(12)
    ranges = [(start, 3 + start % 5) for start in range(9)] * 2
    expected = stock_ranges(x, ranges)
    for (start, length), stock in zip(ranges, expected, strict=True):
        assert torch.equal(rotary.rotate(x[:, :, :length], (start,), (12,)), stock)
        assert len(rotary._tables) <= _TABLES_KEPT


def stock_ranges(x, ranges):
    model = tiny_model("llama")
    return [stock_rotation(model, x[:, :, :length], start) for start, length in ranges]


def test_threads_may_share_an_engine():
    """Tables are looked up and thrown out by many at once; none is lost in between."""
    rotary, x = Backbone(tiny_model("llama")).rotary, random_heads(12)
    ranges = [(start, 3 + start % 5) for start in range(9)]
    expected = stock_ranges(x, ranges)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def rotate_all(first):
        for i in range(first, first + 120):
            start, length = ranges[i % 9]
            assert torch.equal(rotary.rotate(x[:, :, :length], (start,), (12,)), expected[i % 9])

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(rotate_all, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len(rotary._tables) <= _TABLES_KEPT


# --- LongRoPE ---


def frequencies_used(rotary, start, prompt_length):
    """Which factors a rotation used: compare with a naive rotation by either."""
    x = random_heads(3)
    turned = rotary.rotate(x, (start,), (prompt_length,))
    for which, factors in (("short", [1.0, 1.05, 1.1, 1.15]), ("long", [1.0, 1.9, 2.8, 3.7])):
        inverse = 1 / (torch.tensor(factors) * 10000 ** (torch.arange(0, 8, 2) / 8))
        angles = torch.arange(start, start + 3)[:, None] * inverse
        first, second = x.chunk(2, dim=-1)
        naive = torch.cat(
            [
                first * angles.cos() - second * angles.sin(),
                second * angles.cos() + first * angles.sin(),
            ],
            dim=-1,
        )
        scale = rotary._short._module.attention_scaling
        if torch.allclose(turned, naive * scale, atol=1e-5):
            return which
    return "neither"


@pytest.mark.parametrize("start", [20, PHI3_WINDOW - 3, PHI3_WINDOW + 50])
def test_longrope_factors_follow_the_rule_and_not_the_slot(start):
    model = tiny_model("phi3")
    for prompt_length in (10, PHI3_WINDOW, PHI3_WINDOW + 1, 1000):
        by_rule = {rule: Backbone(model, rule).rotary for rule in ("long", "by_length")}
        expected = "long" if prompt_length > PHI3_WINDOW else "short"
        assert frequencies_used(by_rule["long"], start, prompt_length) == "long"
        assert frequencies_used(by_rule["by_length"], start, prompt_length) == expected


def test_requests_on_both_sides_of_the_window_do_not_mix():
    rotary = Backbone(tiny_model("phi3"), "by_length").rotary
    for prompt_length in (50, 150, 50, 150):
        expected = "long" if prompt_length > PHI3_WINDOW else "short"
        assert frequencies_used(rotary, 20, prompt_length) == expected


def test_switch_is_the_original_window():
    assert longrope_switch(tiny_model("phi3").model.rotary_emb) == PHI3_WINDOW
    assert longrope_switch(tiny_model("llama").model.rotary_emb) is None


def test_a_backbone_that_read_a_long_text_before_is_the_same():
    """Stock LongRoPE keeps its last factors in a buffer; they must not become our short ones."""
    model = tiny_model("phi3")
    model.model.rotary_emb(random_heads(1), torch.arange(2 * PHI3_WINDOW)[None])
    rotary = Backbone(model, "by_length").rotary
    assert frequencies_used(rotary, 20, 50) == "short"
    assert frequencies_used(rotary, 20, 500) == "long"


def test_unknown_rule_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="'long' or 'by_length'"):
        Rotary(model.model.rotary_emb, None, "short")


def test_gradients_pass_where_the_fused_kernel_would_have_none(monkeypatch):
    """As on a GPU, whose kernel writes into a tensor that no graph knows."""
    rotary = Backbone(tiny_model("llama")).rotary
    x = random_heads(7).requires_grad_(True)
    weights = torch.randn_like(x)
    expected = torch.autograd.grad((rotary.rotate(x, (3,), (10,)) * weights).sum(), x)
    fused = []

    def without_graph(x, *tables):
        fused.append(1)
        return rotate_at_slots(x.detach(), *tables)

    monkeypatch.setattr(Rotary, "_fuses", lambda self, like: True)
    monkeypatch.setattr("locret.model.rotary.rotate_at_slots", without_graph)
    rotary = Backbone(tiny_model("llama")).rotary
    given = rotary.rotate(x, (3,), (10,))
    assert torch.equal(torch.autograd.grad((given * weights).sum(), x)[0], expected[0])
    assert not fused
    with torch.no_grad():
        assert torch.allclose(rotary.rotate(x, (3,), (10,)), given, atol=1e-6)
    assert fused
