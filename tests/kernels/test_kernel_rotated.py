"""Units of the scheme `rotated`: expanded, and attended to as they are."""

import pytest
import torch

from locret.kernels.decode import packed_shares
from locret.kernels.decode_rotated import takes_small_rotated
from locret.kernels.packed import expand_rotated, expand_rotated_reference
from tests.kernels.close import assert_near
from tests.kernels.rotated import random_rotated
from tests.kernels.test_kernel_decode_packed import compare

BITS = [(2, 2), (3, 3), (4, 4), (8, 8)]


@pytest.mark.parametrize(
    ("lengths", "size", "group"),
    [
        ([139, 0, 90], 64, 64),
        ([70, 1], 128, 32),
        ([65], 80, 64),
        ([0, 30, 7], 96, 8),
        ([9], 256, 4),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_expanded_is_what_the_twin_gives(lengths, size, group, bits, dtype, device):
    packed, count = random_rotated(lengths, size, bits, bits, device, group), sum(lengths)
    at = torch.randperm(count + 5, device=device)[:count]
    for side, starts in ((packed.keys, packed.starts), (packed.values, None)):
        expected = expand_rotated_reference(side, packed.key_levels, size, starts).to(dtype)
        out = torch.full((count + 5, size + 3), torch.nan, device=device).to(dtype)
        expand_rotated(side, packed.key_levels, out[2 : count + 2, :size], starts)
        assert_near(out[2 : count + 2, :size], expected)
        assert out.isnan().sum() == out.numel() - expected.numel()
        out.fill_(torch.nan)
        expand_rotated(side, packed.key_levels, out[:, 1:-2], starts, at)
        assert_near(out[at, 1:-2], expected)
        assert out.isnan().sum() == out.numel() - expected.numel()


@pytest.mark.parametrize(
    ("batch", "rows", "size", "lengths"),
    [
        (1, 3, 64, [139, 0, 90]),
        (2, 1, 80, [65, 1, 0, 40]),
        (1, 4, 128, [70, 3]),
        (1, 16, 96, [70]),
        (1, 2, 192, [33, 20]),
        (1, 5, 256, [40]),
    ],
)
@pytest.mark.parametrize("bits", BITS)
def test_decoding_is_what_the_twin_gives(batch, rows, size, lengths, bits, device):
    packed = random_rotated(lengths, size, *bits, device)
    query = torch.randn(batch, len(lengths) // batch * rows, 1, size, device=device)
    compare(query, packed, lengths)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [*BITS, (3, 2), (4, 3), (2, 8)])
@pytest.mark.parametrize("size", [64, 128])
def test_half_precision(dtype, bits, size, device):
    packed = random_rotated([70, 33], size, *bits, device)
    compare(torch.randn(1, 8, 1, size, device=device).to(dtype), packed, [70, 33])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "rows", "size", "group", "bits"),
    [
        ([139, 0, 33, 100], 4, 128, 64, (3, 3)),
        ([65, 1, 64, 3, 130, 20], 1, 64, 64, (3, 2)),
        ([33, 7, 1, 90], 8, 128, 32, (4, 2)),
        ([40, 17], 7, 256, 64, (2, 3)),
        ([70, 11], 3, 64, 128, (8, 4)),
        ([0, 90], 2, 128, 16, (2, 8)),
    ],
)
def test_small_queries_equal_the_twin(lengths, rows, size, group, bits, dtype, device):
    packed = random_rotated(lengths, size, *bits, device, group)
    assert takes_small_rotated(rows, dtype, packed)
    query = torch.randn(2, len(lengths) // 2 * rows, 1, size, device=device).to(dtype)
    compare(query, packed, lengths)
    compare(query, packed, lengths, shares=packed_shares(packed, lengths, rows, dtype))


def test_small_queries_of_several_new_tokens(device):
    packed = random_rotated([100, 30, 0, 8], 128, 3, 3, device)
    query = torch.randn(2, 4, 4, 128, device=device).transpose(1, 2).half()
    compare(query, packed, [100, 30, 0, 8])


@pytest.mark.parametrize("units", [16, 32])
def test_small_queries_in_smaller_steps(units, device, monkeypatch):
    monkeypatch.setattr("locret.kernels.decode_rotated.STEP", units)
    packed = random_rotated([150, 60], 128, 3, 3, device)
    compare(torch.randn(1, 8, 1, 128, device=device).bfloat16(), packed, [150, 60])


def test_several_new_tokens_are_causal_among_themselves(device):
    packed = random_rotated([100, 30, 0, 8], 64, 3, 3, device)
    query = torch.randn(2, 5, 8, 64, device=device).transpose(1, 2)
    compare(query, packed, [100, 30, 0, 8])


@pytest.mark.parametrize(
    ("lengths", "plain", "tail"),
    [
        ([70, 9], [0, 0], (8, 0)),
        ([70, 9], [0, 0], (0, 0)),
        ([0, 0], [0, 0], (8, 5)),
        ([0, 30], [16, 0], (8, 1)),
        ([0, 30], [0, 0], (8, 0)),
        ([0, 0], [0, 3], (8, 0)),
    ],
)
def test_some_of_it_is_empty(lengths, plain, tail, device):
    packed = random_rotated(lengths, 64, 4, 4, device)
    compare(torch.randn(1, 4, 1, 64, device=device), packed, lengths, plain, tail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_of_zeros_and_large_ones(dtype, device):
    packed = random_rotated([130], 64, 3, 3, device)
    packed.values[1][:70] = 0.0
    packed.values[1][100] = 3000.0
    packed.keys[1][60:70] = 0.0
    packed.keys[1][5] = 30.0
    compare(torch.randn(1, 4, 1, 64, device=device).to(dtype), packed, [130])
