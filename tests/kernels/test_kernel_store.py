import pytest
import torch

from locret.kernels.rotate import store_units


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("new", "slot"), [(1, 0), (1, 12), (5, 3)])
def test_only_the_slots_change(index, dtype, new, slot, device):
    keys, values = torch.randn(2, 2, 3, 13, 80, device=device).to(dtype).unbind()
    keys, values = keys[..., 8:], values.transpose(1, 2).contiguous().transpose(1, 2)
    key, value = (
        torch.randn(2, 3, new, 72, device=device),
        torch.randn(2, 3, new, 80, device=device),
    )
    key, value = key.to(dtype), value.to(dtype)
    expected = keys.clone(), values.clone()
    expected[0][:, :, slot : slot + new] = key
    expected[1][:, :, slot : slot + new] = value
    store_units(keys, values, key, value, torch.tensor([slot], dtype=index, device=device))
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_a_slot_outside_the_storage_is_dropped(device):
    storage = torch.zeros(2, 1, 2, 4, 8, device=device)
    new = torch.ones(1, 2, 1, 8, device=device)
    for slot in (-1, 4, 2**31):
        store_units(*storage[:, :, :, 1:3], new, new, torch.tensor([slot], device=device))
    assert storage.sum() == 0
