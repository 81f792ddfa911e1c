import pytest
import torch

from locret.kernels.dense import HeadNorms
from locret.kernels.packed import hadamard
from locret.kernels.rotate import (
    NewUnit,
    Tables,
    store_rotated,
    store_rotated_reference,
)
from tests.kernels.close import assert_near


def given(batch, query_heads, heads, size, dtype, device):
    """A unit out of one product, and a tail with NaN in it, of capacity 13."""
    flat = torch.randn(batch, 1, (query_heads + 2 * heads) * size, device=device).to(dtype)
    each = flat.split([query_heads * size, heads * size, heads * size], -1)
    new = NewUnit(*(x.unflatten(-1, (-1, size)).transpose(1, 2) for x in each))
    tail = torch.full((2, batch, heads, 15, size + 8), torch.nan, device=device).to(dtype)
    return new, *tail[..., 1:14, 8:]


@pytest.mark.parametrize(
    ("query_heads", "heads", "size", "rotary"),
    [(8, 2, 128, 128), (3, 3, 72, 72), (6, 2, 96, 24), (5, 1, 8, 6)],
)
@pytest.mark.parametrize(("rows", "normed"), [(1, True), (2, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_twin(query_heads, heads, size, rotary, rows, normed, dtype, device):
    new, *tail = given(2, query_heads, heads, size, dtype, device)
    expected = [x.clone() for x in tail]
    tables = Tables(*torch.randn(2, rows, 20, rotary, device=device).to(dtype))
    norms = HeadNorms(*torch.randn(2, size, device=device).to(dtype), 1e-5) if normed else None
    slot = torch.tensor([12], dtype=torch.int32, device=device)
    query = store_rotated(new, *tail, slot, tables, norms)
    assert query.is_contiguous()
    assert_near(query, store_rotated_reference(new, *expected, slot, tables, norms))
    for actual, wanted in zip(tail, expected, strict=True):
        assert_near(actual[:, :, 12], wanted[:, :, 12])
        assert actual[:, :, :12].isnan().all()


def test_layers_without_rope_and_slots_outside(device):
    new, *tail = given(1, 4, 2, 8, torch.float32, device)
    for slot in (13, -1, 5):
        at = torch.tensor([slot], dtype=torch.int32, device=device)
        assert torch.equal(store_rotated(new, *tail, at), new.query)
    for storage, units in zip(tail, new[1:], strict=True):
        assert torch.equal(storage[:, :, 5:6], units)
        assert storage.isnan().sum() == 12 * units.numel()


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_query_comes_turned_by_h_too(size, dtype, device):
    new, *tail = given(2, 6, 2, size, dtype, device)
    tables = Tables(*torch.randn(2, 1, 20, size, device=device).to(dtype))
    slot = torch.tensor([3], dtype=torch.int32, device=device)
    turned = torch.full(new.query.shape, torch.nan, device=device)
    query = store_rotated(new, *tail, slot, tables, turned_query=turned)
    torch.testing.assert_close(turned, query.float() @ hadamard(size, torch.device(device)))


def test_room_for_the_turned_query_has_to_fit(device):
    new, *tail = given(1, 4, 2, 64, torch.float32, device)
    slot = torch.tensor([3], dtype=torch.int32, device=device)
    for room in (torch.empty(1, 4, 1, 32), torch.empty(1, 4, 1, 64, dtype=torch.float16)):
        with pytest.raises(ValueError, match="turned_query"):
            store_rotated(new, *tail, slot, turned_query=room.to(device))
