"""The rotated scheme: its levels, its errors, its bytes, and attention without rotating back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.quantization import describe_scheme, make_scheme, scheme_of
from locret.quantization.codes import (
    PLANES,
    block_mean,
    decode_rotated,
    encode_rotated,
    hadamard,
    levels,
    pack_planes,
    unpack_planes,
)
from tests.quantization.rectangles import Layer, quantize_keys, quantize_values

BITS = sorted(PLANES)
DISTORTION = {2: 0.1174818478, 3: 0.0345477608, 4: 0.0095010080}
"""Mean square error of the levels of Lloyd and Max, of N(0, 1)."""
LLOYD_MAX = sorted(DISTORTION)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORMAL = torch.distributions.Normal(torch.tensor(0.0).double(), 1.0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def restored(scheme, keys):
    """Blocks [M, g, D] of keys, encoded and decoded."""
    units, tables = scheme.encode_keys(keys, None)
    tables = tuple(table[:, None].expand(-1, keys.shape[1], -1) for table in tables)
    return scheme.decode_keys(units, tables, keys.shape[-1])


def restored_values(scheme, values):
    return scheme.decode_values(scheme.encode_values(values, None), values.shape[-1])


def blocks_of(packed):
    """long [P]: the block of each unit, the same in every head."""
    return torch.searchsorted(packed.starts[0, 0, 1:], torch.arange(packed.count), right=True)


@pytest.mark.parametrize("size", [2, 6, 8, 64, 80, 96, 128, 192, 256])
def test_hadamard_is_its_own_inverse_and_keeps_lengths(size):
    x = normal(3, 5, size)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-5)
    assert torch.allclose(hadamard(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_hadamard_is_the_matrix_of_its_name():
    matrix = torch.ones(1, 1)
    for _ in range(4):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    x = normal(7, 48)
    blocks = (x.unflatten(-1, (3, 16)) @ matrix / 4).flatten(-2)
    assert torch.allclose(hadamard(x), blocks, atol=1e-5)
    assert hadamard(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [quantize_keys, quantize_values])
def test_an_odd_head_size_is_refused(make):
    with pytest.raises(ValueError, match="'rotated' needs an even head size; it is 33"):
        make(make_scheme("rotated"), torch.zeros(1, 1, 4, 33))


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_levels_are_the_means_of_their_cells(bits):
    level = levels(bits).double()
    between = (level[1:] + level[:-1]) / 2
    edges = torch.cat([torch.tensor([-40.0]), between, torch.tensor([40.0])]).double()
    density, below = NORMAL.log_prob(edges).exp(), NORMAL.cdf(edges)
    mass = below.diff()
    assert torch.allclose(-density.diff() / mass, level, atol=1e-6)
    assert float(1 - (mass * level.square()).sum()) == pytest.approx(DISTORTION[bits], rel=1e-5)


def test_an_even_grid_of_eight_bits_is_as_good_as_lloyd_and_max():
    """256 levels of Lloyd and Max lose sqrt(3) pi / 2 / 256 ** 2, to a few per cent."""
    x = normal(4000, 128)
    error = (restored_values(make_scheme("rotated", bits=8), x) - x).square().mean()
    assert error < 1.05 * math.sqrt(3) * math.pi / 2 / 256**2


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_the_error_of_normal_units_is_that_of_the_theory(bits, size):
    scheme, x = make_scheme("rotated", bits=bits), normal(200, 64, size)
    # Scales that fit a unit take a little of the error away, more at fewer channels.
    for back in (restored(scheme, x), restored_values(scheme, x)):
        assert 1 - 10 / size < (back - x).square().mean() / DISTORTION[bits] < 1.05


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("bits", BITS)
def test_inner_products_are_right_on_average(bits, size):
    """What is told of <q, x> by <q, decoded x> is that it is as large on average."""
    scheme = make_scheme("rotated", bits=bits)
    keys = normal(20, 64, size) * normal(size, seed=1).exp() + 30 * normal(size, seed=2)
    query = normal(1024, size, seed=3)
    mean = block_mean(keys)
    true = (keys - mean) @ query.T
    told = (restored(scheme, keys) - mean) @ query.T
    assert float((true * told).sum() / told.square().sum()) == pytest.approx(1, abs=0.01)
    assert float((told - true).mean().abs() / true.std()) < 0.01


@pytest.mark.parametrize("size", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(
    ("key_bits", "value_bits"), [(2, 2), (3, 2), (3, 3), (4, 2), (4, 4), (8, 8)]
)
def test_bytes_of_an_element(key_bits, value_bits, size):
    scheme = make_scheme("rotated", key_bits=key_bits, value_bits=value_bits)
    x = normal(1, 2, 256, size).half()
    keys, values = quantize_keys(scheme, x), quantize_values(scheme, x)
    bits_of_keys = sum(tensor.nbytes for tensor in (*keys.units, *keys.tables)) * 8 / x.numel()
    bits_of_values = sum(tensor.nbytes for tensor in values.tensors) * 8 / x.numel()
    assert bits_of_keys == key_bits + 16 / size + 16 / 64
    assert bits_of_values == value_bits + 16 / size
    if size == 128:
        assert (bits_of_keys, bits_of_values) == (key_bits + 0.375, value_bits + 0.125)


@given(st.sampled_from(BITS), st.integers(1, 40), st.integers(0, 1000))
def test_planes_come_back(bits, half, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (3, 2 * half), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_planes(pack_planes(codes, bits), bits, 2 * half), codes)


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    codes = torch.arange(8, dtype=torch.uint8)
    low, lower, high = pack_planes(codes, 3).tolist()
    assert [low >> shift & 3 for shift in (0, 2, 4, 6)] == [0, 2, 0, 2]  # codes 0, 2, 4, 6
    assert [lower >> shift & 3 for shift in (0, 2, 4, 6)] == [1, 3, 1, 3]  # codes 1, 3, 5, 7
    assert [high >> shift & 1 for shift in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


@settings(max_examples=60)
@given(
    bits=st.sampled_from(BITS),
    half=st.integers(1, 40),
    units=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    bias=st.sampled_from([0.0, 1.5, -400.0]),
)
def test_no_unit_loses_more_than_its_codes_may(bits, half, units, dtype, spread, bias):
    """The scale is that of least error, so that no unit comes back worse than as nothing."""
    x = (normal(1, 2, units, 2 * half, seed=units) * spread + bias).to(dtype)
    scheme = make_scheme("rotated", bits=bits)
    tiny = 1e-6 + x.float().norm(dim=-1) * 2e-3  # float16 scales and bfloat16 means
    back = quantize_values(scheme, x).dequantize(torch.float32)
    assert ((back - x.float()).norm(dim=-1) <= x.float().norm(dim=-1) + tiny).all()
    packed = quantize_keys(scheme, x)
    away = x.float() - packed.tables[0].float()[:, :, blocks_of(packed)]
    error = (packed.dequantize(torch.float32) - x.float()).norm(dim=-1)
    assert (error <= away.norm(dim=-1) + tiny).all()


@pytest.mark.parametrize("value", [0.0, 1.5, -40.0, 300.0, 30000.0])
@pytest.mark.parametrize("bits", BITS)
def test_keys_that_are_all_the_same_are_their_mean(value, bits):
    x = torch.full((1, 1, 70, 64), value)
    back = quantize_keys(make_scheme("rotated", bits=bits), x).dequantize(torch.float32)
    assert (back - x).norm() <= x.norm() * 2.0**-8  # bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_one_unit_is_its_mean(dtype):
    x = normal(1, 1, 1, 64).to(dtype)
    back = quantize_keys(make_scheme("rotated", bits=2), x).dequantize(torch.float32)
    assert (back - x.float()).norm() <= x.float().norm() * 2.0**-9


def test_units_that_fill_up_a_short_block_have_no_say_in_its_mean():
    x = normal(2, 5, 8)
    filled = torch.cat([x, x[:, -1:].expand(-1, 59, -1)], 1)
    assert torch.allclose(block_mean(filled), x.mean(1, keepdim=True), atol=1e-6)


def test_a_scale_beyond_float16_is_refused():
    z = torch.zeros(1, 128)
    z[0, 0] = 40000.0 * 128**0.5
    with pytest.raises(ValueError, match="cannot quantize"):
        encode_rotated(z, 3)


def test_large_biases_of_a_channel_cost_the_keys_nothing():
    x = normal(4, 64, 128)
    scheme = make_scheme("rotated")
    plain = (restored(scheme, x) - x).square().mean()
    x[..., [3, 60, 100]] += torch.tensor([354.0, -111.0, 43.0])
    assert (restored(scheme, x) - x).square().mean() < 1.1 * plain


def test_a_large_channel_costs_less_than_a_minimum_and_a_maximum_do():
    """Per channel two bits of a range collapse; rotated, they do not."""
    x = torch.distributions.StudentT(4.0).rsample((1, 1, 256, 128))
    rotated, kivi = (
        (quantize_keys(make_scheme(name, bits=2), x).dequantize(torch.float32) - x).square().mean()
        for name in ("rotated", "kivi")
    )
    assert rotated < kivi / 2


def attend(scheme, query, keys, tables, values, scaling):
    """Attention over codes, no unit rotated back: the plain twin of kernels that do so.

    Args:
        query: floating [..., R, D].
        keys, values: what each unit needs, tensors [..., S, *].
        tables: each unit's entry of the key tables, tensors [..., S, *].

    Returns:
        Outputs float32 [..., R, D], and the logarithm of the sum of the weights' exponentials
        float32 [..., R], for a merge with attention over other units.
    """
    query, size = query.float(), query.shape[-1]
    turned = hadamard(query) @ decode_rotated(keys, scheme.key_bits, size).mT
    logits = (turned + query @ tables[0].float().mT) * scaling
    summed = logits.softmax(-1) @ decode_rotated(values, scheme.value_bits, size)
    return hadamard(summed), logits.logsumexp(-1)


@pytest.mark.parametrize(("size", "key_bits", "value_bits"), [(64, 3, 3), (80, 4, 2), (128, 8, 8)])
def test_attention_without_rotating_a_unit_back(size, key_bits, value_bits):
    scheme = make_scheme("rotated", key_bits=key_bits, value_bits=value_bits)
    keys, values = normal(2, 3, 100, size) + 5, normal(2, 3, 100, size, seed=1)
    query, scaling = normal(2, 3, 4, size, seed=2), size**-0.5
    packed, packed_values = quantize_keys(scheme, keys), quantize_values(scheme, values)
    at_units = tuple(table[:, :, blocks_of(packed)] for table in packed.tables)
    told, total = attend(scheme, query, packed.units, at_units, packed_values.units, scaling)
    logits = query @ packed.dequantize(torch.float32).mT * scaling
    expected = logits.softmax(-1) @ packed_values.dequantize(torch.float32)
    assert torch.allclose(told, expected, atol=1e-4)
    assert torch.allclose(total, logits.logsumexp(-1), atol=1e-4)


def test_bits_of_keys_and_of_values():
    assert make_scheme("rotated") == make_scheme("rotated", bits=3, key_bits=3, value_bits=3)
    assert make_scheme("rotated", bits=2) == make_scheme("rotated", key_bits=2, value_bits=2)
    scheme = make_scheme("rotated", key_bits=4, value_bits=2)
    assert (scheme.bits, scheme.key_bits, scheme.value_bits) == (4, 4, 2)
    assert scheme_of(describe_scheme(scheme)) == scheme
    assert not scheme_of({"name": "rotated", "bits": 16}).packs


@pytest.mark.parametrize("option", ["bits", "key_bits", "value_bits"])
def test_other_bits_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} is 5; rotated takes 2, 3, 4, 8"):
        make_scheme("rotated", **{option: 5})


@pytest.mark.parametrize("residual", [0, 16])
def test_drift_over_many_evictions_is_small(residual):
    """Keys of blocks that are packed anew are rounded again, which must not add up."""
    scheme = make_scheme("rotated", bits=4, residual=residual)
    layer, generator = Layer(scheme), torch.Generator().manual_seed(0)
    kept = torch.empty(1, 2, 0, 64)
    for turn in range(30):
        x = normal(1, 2, 128, 64, seed=turn) + 20
        layer.append(x, x)
        kept = torch.cat([kept, x], 2)
        index = torch.rand(1, 2, kept.shape[2], generator=generator)
        index = index.topk(min(512, kept.shape[2]), -1).indices.sort(-1).values
        layer.select(index)
        kept = kept.gather(2, index[..., None].expand(-1, -1, -1, 64))
    error = (layer.dense(torch.float32)[0] - kept)[:, :, : layer.packed].square().mean()
    assert error < 4 * DISTORTION[4]
