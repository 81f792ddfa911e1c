import pytest
import torch

from locret.kernels.dispatch import INTERPRETED
from locret.kernels.packed import expand_units, expand_units_reference
from tests.kernels.packed import random_units


def assert_same(packed, size, dtype, device):
    """Keys and values come out bit for bit as the twin's, and nothing else is written."""
    how = (packed.bits, packed.group)
    batch, heads, count, _ = packed.keys[0].shape
    for side, starts in ((packed.keys, packed.starts), (packed.values, None)):
        storage = torch.full((batch, heads, count + 5, size + 3), torch.nan, device=device)
        storage = storage.to(dtype)
        expand_units(side, *how, storage[:, :, 2 : count + 2, :size], starts)
        expected = storage.clone()
        expected[:, :, 2 : count + 2, :size] = expand_units_reference(side, *how, size, starts)
        if INTERPRETED and dtype == torch.bfloat16:  # which the interpreter does not round
            torch.testing.assert_close(storage, expected, rtol=8e-3, atol=0, equal_nan=True)
        else:
            assert torch.equal(storage.isnan(), expected.isnan())
            assert torch.equal(storage.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    ("heads", "size", "count", "group"),
    [(3, 64, 139, 64), (2, 128, 70, 32), (1, 80, 65, 64), (2, 96, 130, 128), (1, 17, 9, 16)],
)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_gives_the_twins_bits(heads, size, count, group, bits, dtype, device):
    assert_same(random_units(2, heads, count, size, bits, group, device), size, dtype, device)


@pytest.mark.parametrize("count", [1, 2, 64, 65])
def test_few_units(count, device):
    assert_same(random_units(1, 2, count, 32, 4, 64, device), 32, torch.float32, device)


def test_nothing(device):
    packed = random_units(1, 2, 3, 32, 4, 64, device)
    values = [tensor[:, :, :0] for tensor in packed.values]
    expand_units(values, 4, 64, torch.empty(1, 2, 0, 32, device=device))
