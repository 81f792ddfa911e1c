import pytest
import torch

from locret.kernels.decode import (
    Plain,
    decode_packed,
    decode_packed_reference,
    decode_shares,
    packed_shares,
)
from locret.kernels.decode_kivi import takes_small
from tests.kernels.close import assert_near
from tests.kernels.packed import random_shares, random_units


def compare(query, packed, lengths, plain=None, tail=(40, 21), shares=None):
    """Of sequences of `lengths` packed and `plain` plain units, and a tail's capacity and length,
    whose spare room is poisoned."""
    device, size = query.device, query.shape[3]
    batch, plain = query.shape[0], [5] * len(lengths) if plain is None else plain
    units = torch.randn(2, sum(plain), size, device=device).to(query.dtype)
    tails = torch.randn(2, batch, len(lengths) // batch, tail[0], size, device=device)
    tails[:, :, :, tail[1] :] = torch.nan
    filled = torch.tensor([tail[1]], dtype=torch.int32, device=device)
    rest = Plain(*units, decode_shares(plain, device), *tails.to(query.dtype), filled)
    given = (query, packed, shares or random_shares(packed, lengths, device), rest, size**-0.5)
    expected = decode_packed_reference(*given)
    assert not expected.isnan().any()
    assert_near(decode_packed(*given), expected)


@pytest.mark.parametrize(
    ("batch", "rows", "size", "lengths", "group"),
    [
        (1, 3, 64, [139, 0, 90], 64),
        (1, 4, 128, [70, 3], 32),
        (1, 1, 80, [65], 64),
        (2, 1, 80, [65, 1, 0, 40], 16),
        (1, 16, 96, [70], 128),
        (1, 7, 16, [9], 16),
        (1, 2, 192, [33, 20], 64),
        (1, 5, 256, [40], 64),
    ],
)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_kernel_equals_twin(batch, rows, size, lengths, group, bits, device):
    packed = random_units(lengths, size, bits, group, device)
    heads = len(lengths) // batch
    query = torch.randn(batch, heads * rows, 1, size, device=device)
    compare(query, packed, lengths)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "group"), [(128, 64), (96, 32), (96, 64), (160, 64), (192, 64)])
def test_half_precision(bits, dtype, size, group, device):
    packed = random_units([70], size, bits, group, device)
    compare(torch.randn(1, 4, 1, size, device=device).to(dtype), packed, [70])


def test_several_new_tokens_are_causal_among_themselves(device):
    packed = random_units([100, 30], 64, 4, 64, device)
    compare(torch.randn(1, 8, 5, 64, device=device), packed, [100, 30])


@pytest.mark.parametrize(
    ("lengths", "plain", "tail"),
    [
        ([70, 9], [0, 0], (8, 0)),
        ([70, 9], [0, 0], (0, 0)),
        ([0, 0], [0, 0], (8, 5)),
        ([0, 30], [16, 0], (8, 1)),
        ([0, 0], [0, 3], (8, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_some_of_it_is_empty(lengths, plain, tail, dtype, device):
    packed = random_units(lengths, 64, 4, 64, device)
    compare(torch.randn(1, 4, 1, 64, device=device).to(dtype), packed, lengths, plain, tail)


def test_views_of_a_query(device):
    packed = random_units([40, 0, 12, 30], 64, 4, 64, device)
    query = torch.randn(2, 3, 4, 70, device=device)[..., 3:67].transpose(1, 2)
    compare(query, packed, [40, 0, 12, 30])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "rows", "size", "group", "bits"),
    [
        ([139, 0, 33, 100], 4, 128, 64, 4),
        ([65, 1, 64, 3, 130, 20], 1, 64, 64, 4),
        ([70, 30], 8, 256, 64, 4),
        ([33, 7, 1, 90], 7, 128, 32, 4),
        ([90, 20], 4, 128, 128, 4),
        ([139, 40], 3, 128, 64, 2),
        ([139, 11], 2, 128, 64, 8),
    ],
)
def test_small_queries_equal_the_twin(lengths, rows, size, group, bits, dtype, device):
    packed = random_units(lengths, size, bits, group, device)
    assert takes_small(rows, dtype, packed)
    query = torch.randn(2, len(lengths) // 2 * rows, 1, size, device=device).to(dtype)
    compare(query, packed, lengths)
    compare(query, packed, lengths, shares=packed_shares(packed, lengths, rows, dtype))


@pytest.mark.parametrize("units", [16, 32])
def test_small_queries_in_smaller_steps(units, device, monkeypatch):
    monkeypatch.setattr("locret.kernels.decode_kivi.STEP", units)
    packed = random_units([150, 60], 128, 4, 64, device)
    compare(torch.randn(1, 8, 1, 128, device=device).bfloat16(), packed, [150, 60])


def test_small_queries_of_several_new_tokens(device):
    packed = random_units([100, 0], 128, 4, 64, device)
    compare(torch.randn(1, 4, 3, 128, device=device).half(), packed, [100, 0])


def test_small_queries_with_strong_and_weak_scales(device):
    """Products with the query near the ends of float16, and a unit that outweighs all others."""
    packed = random_units([130], 128, 4, 64, device)
    packed.keys[1][:, ::2] *= 2.0**-12
    packed.keys[1][:, 1] = 60.0
    packed.keys[2][:, ::3] = 3.0
    query = torch.randn(1, 4, 1, 128, device=device)
    query[:, 0] *= 30.0
    compare(query.half(), packed, [130])
