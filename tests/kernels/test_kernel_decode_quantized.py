import pytest
import torch

from locret.kernels.decode_quantized import (
    decode_attention_quantized,
    decode_attention_quantized_reference,
)
from locret.kernels.decode_quantized_small import takes_small
from tests.kernels.close import assert_near
from tests.kernels.packed import random_units


def compare(query, packed, length, capacity, first=None):
    batch, heads = packed.keys[0].shape[:2]
    shape = (2, batch, heads, capacity, query.shape[3])
    storage = torch.randn(shape, device=query.device).to(query.dtype)
    storage[:, :, :, length:] = torch.nan
    filled = torch.tensor([length], dtype=torch.int32, device=query.device)
    arguments = (query, packed, *storage.unbind(), filled, query.shape[3] ** -0.5, first)
    assert_near(
        decode_attention_quantized(*arguments), decode_attention_quantized_reference(*arguments)
    )


@pytest.mark.parametrize(
    ("heads", "rows", "size", "count", "group"),
    [
        (3, 3, 64, 139, 64),
        (2, 4, 128, 70, 32),
        (1, 1, 80, 65, 64),
        (1, 16, 96, 70, 128),
        (1, 7, 16, 9, 16),
    ],
)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_kernel_equals_twin(heads, rows, size, count, group, bits, device):
    packed = random_units(1, heads, count, size, bits, group, device)
    compare(torch.randn(1, heads * rows, 1, size, device=device), packed, 21, 40)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "group"), [(128, 64), (96, 32), (96, 64), (160, 64), (192, 64)])
def test_half_precision(bits, dtype, size, group, device):
    packed = random_units(1, 1, 70, size, bits, group, device)
    compare(torch.randn(1, 4, 1, size, device=device).to(dtype), packed, 21, 40)


def test_rows_begin_at_their_own_slots(device):
    packed = random_units(2, 3, 100, 32, 4, 64, device)
    query = torch.randn(2, 6, 1, 32, device=device)
    first = torch.tensor([[0, 5, 99], [100, 107, 200]], dtype=torch.int32, device=device)
    compare(query, packed, 11, 40, first)


def test_several_new_tokens_are_causal_among_themselves(device):
    packed = random_units(1, 2, 100, 64, 4, 64, device)
    compare(torch.randn(1, 8, 5, 64, device=device), packed, 21, 40)


def test_only_packed_units_or_none(device):
    query = torch.randn(1, 4, 1, 64, device=device)
    compare(query, random_units(1, 2, 70, 64, 4, 64, device), 0, 8)
    compare(query, random_units(1, 2, 0, 64, 4, 64, device), 5, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "rows", "size", "count", "group", "bits"),
    [
        (2, 4, 128, 139, 64, 4),
        (3, 1, 64, 65, 64, 4),
        (1, 8, 256, 70, 64, 4),
        (2, 7, 128, 33, 32, 4),
        (2, 4, 128, 90, 128, 4),
        (2, 3, 128, 139, 64, 2),
        (1, 2, 128, 139, 64, 8),
    ],
)
def test_small_queries_equal_the_twin(heads, rows, size, count, group, bits, dtype, device):
    packed = random_units(2, heads, count, size, bits, group, device)
    query = torch.randn(2, heads * rows, 1, size, device=device).to(dtype)
    assert takes_small(query, packed)
    compare(query, packed, 21, 40)
    first = torch.randint(0, count + 20, (2, heads), dtype=torch.int32, device=device)
    compare(query, packed, 21, 40, first)


@pytest.mark.parametrize("units", [16, 32])
def test_small_queries_in_smaller_tiles(units, device, monkeypatch):
    monkeypatch.setattr("locret.kernels.decode_quantized_small.UNITS", units)
    packed = random_units(1, 2, 150, 128, 4, 64, device)
    compare(torch.randn(1, 8, 1, 128, device=device).bfloat16(), packed, 21, 40)


def test_small_queries_of_several_new_tokens(device):
    packed = random_units(1, 2, 100, 128, 4, 64, device)
    compare(torch.randn(1, 4, 3, 128, device=device).half(), packed, 21, 40)


def test_small_queries_with_strong_and_weak_scales(device):
    """Products with the query near the ends of float16, and a unit that outweighs all others."""
    packed = random_units(1, 1, 130, 128, 4, 64, device)
    packed.keys[1][..., ::2] *= 2.0**-12
    packed.keys[1][..., 1] = 60.0
    packed.keys[2][..., ::3] = 3.0
    query = torch.randn(1, 4, 1, 128, device=device)
    query[:, 0] *= 30.0
    compare(query.half(), packed, 21, 40)
