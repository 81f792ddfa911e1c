import pytest
import torch

from locret.kernels.rotate import (
    rotate_at_slots,
    rotate_at_slots_reference,
    rotate_units,
    rotate_units_reference,
)
from tests.kernels.close import assert_near

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tables(batch, slots, size, device, dtype=torch.float32):
    return torch.randn(2, batch, slots, size, device=device, dtype=dtype).unbind()


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("heads", "slots", "size", "rotary"),
    [(8, 17, 64, 64), (3, 1, 16, 16), (5, 63, 80, 80), (4, 9, 96, 24), (9, 5, 256, 256)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_twin(pairing, heads, slots, size, rotary, dtype, device):
    x = torch.randn(2, heads, slots, size, device=device).to(dtype)
    cos, sin = tables(1, slots, rotary, device)
    actual = rotate_at_slots(x, cos, sin, pairing)
    assert actual.is_contiguous()
    assert_near(actual, rotate_at_slots_reference(x, cos, sin, pairing))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rows_of_a_batch_have_their_own_tables(pairing, device):
    x = torch.randn(3, 2, 7, 32, device=device)
    cos, sin = tables(3, 7, 16, device, torch.bfloat16)
    assert_near(
        rotate_at_slots(x, cos, sin, pairing), rotate_at_slots_reference(x, cos, sin, pairing)
    )


def test_views_of_larger_storage(device):
    storage = torch.randn(2, 3, 40, 64, device=device)
    target = torch.full((2, 19, 3, 64), torch.nan, device=device).transpose(1, 2)
    x, (cos, sin) = storage[:, :, 5:24], tables(1, 19, 64, device)
    expected = rotate_at_slots_reference(x, cos, sin, "half")
    assert rotate_at_slots(x, cos, sin, out=target) is target
    assert_near(target, expected)
    transposed = torch.randn(2, 3, 64, 19, device=device).transpose(2, 3)
    assert_near(
        rotate_at_slots(transposed, cos, sin),
        rotate_at_slots_reference(transposed, cos, sin, "half"),
    )


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_in_place(pairing, device):
    x = torch.randn(1, 3, 21, 80, device=device)
    cos, sin = tables(1, 21, 40, device)
    expected = rotate_at_slots_reference(x, cos, sin, pairing)
    assert_near(rotate_at_slots(x, cos, sin, pairing, out=x), expected)


def test_nothing_to_rotate(device):
    x = torch.randn(1, 3, 0, 16, device=device)
    assert rotate_at_slots(x, *tables(1, 0, 16, device)).shape == x.shape
    x = torch.randn(1, 3, 5, 16, device=device)
    assert torch.equal(rotate_at_slots(x, *tables(1, 5, 0, device)), x)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("count", "slots", "size", "rotary", "index"),
    [
        (117, 300, 64, 64, torch.int32),
        (1, 1, 16, 16, torch.int64),
        (63, 9, 80, 24, torch.int32),
        (5, 40, 96, 96, torch.int64),
        (0, 7, 256, 256, torch.int32),
        (4, 7, 16, 0, torch.int32),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_units_at_slots_of_their_own(pairing, count, slots, size, rotary, index, dtype, device):
    x = torch.randn(count, size, device=device).to(dtype)
    cos, sin = torch.randn(2, slots, rotary, device=device)
    at = torch.randint(0, slots, (count,), device=device).to(index)
    actual = rotate_units(x, cos, sin, at, pairing)
    assert actual.is_contiguous()
    assert_near(actual, rotate_units_reference(x, cos, sin, at, pairing))


def test_units_and_tables_are_views(device):
    x, wide = torch.randn(64, 23, device=device).mT, torch.randn(2, 90, 70, device=device)
    cos, sin = wide[:, 5:80, 3:67]
    at = torch.randint(0, 75, (46,), device=device)[::2]
    expected = rotate_units_reference(x, cos, sin, at, "half")
    assert_near(rotate_units(x, cos, sin, at), expected)
