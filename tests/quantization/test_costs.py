"""Bytes foretold are bytes taken; budgets move so that layers cost the same."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.quantization import SCHEMES, describe_scheme, make_scheme, scheme_of
from locret.quantization.blocks import (
    block_limit,
    costs_of,
    most_bytes,
    units_within,
)
from tests.quantization.rectangles import Layer

PACKING = sorted(name for name, scheme in SCHEMES.items() if scheme.packs)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("name", "bits", "share"),
    [("kivi", 4, 0.28125), ("kivi", 8, 0.53125), ("kivi", 2, 0.15625), ("none", 16, 1.0)],
)
def test_the_published_share_of_sixteen_bits(name, bits, share, size):
    costs = costs_of(make_scheme(name, bits=bits), size)
    assert costs.packed / (4 * size) == pytest.approx(share, abs=0.0005)


@settings(max_examples=60)
@given(
    name=st.sampled_from(["none", "kivi", "fp8", "rotated"]),
    budget=st.integers(1, 300),
    residual=st.integers(0, 20),
    size=st.sampled_from([6, 16]),
    evictions=st.integers(1, 8),
)
def test_no_history_takes_more_bytes_than_foretold(name, budget, residual, size, evictions):
    scheme = make_scheme(name, group=8, residual=residual)
    generator = torch.Generator().manual_seed(budget)
    layer = Layer(scheme)
    for _ in range(evictions):
        x = torch.randn(1, 2, 70, size, generator=generator).half()
        layer.append(x, x)
        keep = min(budget, layer.count)
        ranks = torch.rand(1, 2, layer.count, generator=generator)
        if scheme.packs:
            layer.select(ranks.topk(keep, -1).indices.sort(-1).values)
        else:
            layer.plain = tuple(x[:, :, :keep] for x in layer.plain)
    # Outliers are not foretold; one start more than blocks.
    assert layer.nbytes <= 2 * most_bytes(scheme, layer.count, size) + 4


def test_an_empty_sequence_costs_nothing():
    assert most_bytes(make_scheme("kivi"), 0, 64) == 0


@settings(max_examples=100)
@given(
    name=st.sampled_from(PACKING),
    nbytes=st.integers(0, 10**7),
    size=st.sampled_from([64, 80, 128]),
)
def test_as_many_units_as_fit(name, nbytes, size):
    scheme = make_scheme(name).for_layer(0)
    units = units_within(scheme, nbytes, size)
    assert units == 0 or most_bytes(scheme, units, size) <= nbytes
    assert most_bytes(scheme, units + 200, size) > nbytes


@given(packed=st.integers(1, 10**5), residual=st.integers(0, 200))
def test_a_head_may_always_have_its_units_in_full_blocks(packed, residual):
    costs = costs_of(make_scheme("kivi"), 64)
    assert block_limit(costs, packed, residual) >= -(-packed // 64)


def test_layers_at_more_bits_hold_fewer_tokens_in_the_same_bytes():
    scheme = make_scheme("layerquant")
    budgets = scheme.budgets(4096, num_layers=6, head_size=128)
    assert [scheme.for_layer(layer).bits for layer in range(6)] == [8, 8, 8, 8, 4, 4]
    assert budgets[4:] == [4096, 4096] and len(set(budgets[:4])) == 1
    assert 0.5 < budgets[0] / 4096 < 0.56  # scales and minimums cost the same at any bits
    eight, four = (most_bytes(scheme.for_layer(layer), budgets[layer], 128) for layer in (0, 5))
    assert eight <= four < eight * 1.01


@pytest.mark.parametrize("options", [{}, {"scheme": "rotated"}, {"scheme": "kvquant"}])
def test_layers_of_any_scheme_cost_the_same(options):
    scheme = make_scheme("layerquant", **options)
    budgets = scheme.budgets(4096, num_layers=6, head_size=128)
    eight, four = (most_bytes(scheme.for_layer(layer), budgets[layer], 128) for layer in (0, 5))
    assert budgets[5] == 4096 and eight <= four < eight * 1.01


def test_layers_at_other_bits_of_keys_than_of_values():
    scheme = make_scheme(
        "layerquant",
        scheme="rotated",
        bits={"key_bits": 3, "value_bits": 2},
        quant_layers_bits=4,
        quant_begin_layers=1,
        quant_end_layers=3,
    )
    found = [scheme.for_layer(layer) for layer in range(4)]
    assert [(each.key_bits, each.value_bits) for each in found] == [(3, 2), (4, 4), (4, 4), (3, 2)]
    assert {each.name for each in found} == {"rotated"}
    budgets = scheme.budgets(4096, num_layers=4, head_size=128)
    assert budgets[0] == budgets[3] == 4096 and 2500 < budgets[1] == budgets[2] < 3000
    assert hash(scheme) and scheme_of(json.loads(json.dumps(describe_scheme(scheme)))) == scheme


def test_a_range_beyond_the_model_is_refused():
    with pytest.raises(ValueError, match="quant_end_layers is 4; the model has 3 layers"):
        make_scheme("layerquant").budgets(100, num_layers=3, head_size=64)


def test_other_schemes_give_every_layer_the_same():
    assert make_scheme("kivi").budgets(100, 3, 64) == [100, 100, 100]
    assert make_scheme("kivi").for_layer(2) == make_scheme("kivi")
