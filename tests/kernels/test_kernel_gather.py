import pytest
import torch

from locret.kernels.evict import gather_units, gather_units_reference


def units(batch, heads, count, size, device, capacity=None):
    """A layer's keys, values, scores and positions, views of larger storage."""
    shape = (batch, heads, capacity or count)
    return tuple(
        tensor[:, :, :count]
        for tensor in (
            torch.randn(*shape, size, device=device).bfloat16(),
            torch.randn(*shape, size, device=device).bfloat16(),
            torch.randn(shape, device=device),
            torch.randint(0, 2**40, shape, device=device),
        )
    )


def kept(batch, heads, count, keep, device):
    index = torch.stack([torch.randperm(count)[:keep].sort().values for _ in range(batch * heads)])
    return index.view(batch, heads, keep).to(device)


@pytest.mark.parametrize(
    ("held", "new", "keep", "size", "room"),
    [
        (9, 4, 6, 80, 0),
        (300, 63, 301, 64, 5),
        (0, 7, 3, 16, 1),
        (5, 0, 4, 256, 0),
        (1, 1, 1, 20, 3),
    ],
)
def test_kernel_equals_twin(held, new, keep, size, room, device):
    old = units(2, 3, held, size, device, capacity=held + 11)
    fresh = units(2, 3, new, size, device)
    index = kept(2, 3, held + new, keep, device)
    storage = gather_units(old, fresh, index, room)
    for actual, expected in zip(storage, gather_units_reference(old, fresh, index), strict=True):
        assert actual.shape[2] == keep + room and actual.is_contiguous()
        assert torch.equal(actual[:, :, :keep], expected)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float64, torch.uint8, torch.int16, torch.bool]
)
def test_any_dtype(dtype, device):
    old = (torch.randint(0, 2, (1, 2, 8, 3), device=device).to(dtype),)
    new = (torch.randint(0, 2, (1, 2, 5, 3), device=device).to(dtype),)
    index = kept(1, 2, 13, 9, device)
    (actual,) = gather_units(old, new, index)
    assert torch.equal(actual, gather_units_reference(old, new, index)[0])


def test_indices_need_not_be_in_order_and_elements_need_not_be_adjacent(device):
    old = (torch.randn(1, 2, 16, 8, device=device).transpose(2, 3),)
    new = (torch.randn(1, 2, 3, 16, device=device),)
    index = torch.tensor([[[10, 0, 0, 9], [1, 8, 2, 2]]], device=device)
    (actual,) = gather_units(old, new, index)
    assert torch.equal(actual, gather_units_reference(old, new, index)[0])


def test_nothing_kept(device):
    old, new = units(1, 2, 4, 8, device), units(1, 2, 1, 8, device)
    index = torch.empty(1, 2, 0, dtype=torch.long, device=device)
    assert [t.shape[2] for t in gather_units(old, new, index, room=6)] == [6] * 4
