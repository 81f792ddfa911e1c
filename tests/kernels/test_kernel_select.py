import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locret.kernels import evict
from locret.kernels.evict import threshold_select, threshold_select_reference

SCORES = st.sampled_from([-0.0, 0.0, 1.0, -1.0, 1e-40, -3e38, torch.inf, -torch.inf, torch.nan])


def compare(scores, budget, tail=0, head=0):
    actual = threshold_select(scores, budget, tail, head)
    assert torch.equal(actual, threshold_select_reference(scores, budget, tail, head))
    return actual


@pytest.mark.parametrize(("size", "budget"), [(2, 1), (17, 16), (63, 5), (301, 150), (3000, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_twin(size, budget, dtype, device):
    scores = torch.randn(1, 3, size, device=device).to(dtype)
    compare(scores, budget)
    compare(scores, budget, tail=budget // 3, head=budget // 3)


def test_highest_as_topk(device):
    scores = torch.randperm(3 * 700, device=device).view(1, 3, 700).float() - 1000
    assert torch.equal(compare(scores, 500), scores.topk(500).indices.sort().values)


def test_heads_longer_than_registers_hold(device, monkeypatch):
    monkeypatch.setattr(evict, "_RESIDENT", 64)
    monkeypatch.setattr(evict, "_TILE", 32)
    scores = torch.randn(1, 1, 301, device=device).round(decimals=1)
    for budget in (1, 200, 300):
        compare(scores, budget, tail=budget // 2)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SCORES, min_size=2, max_size=40), st.data())
def test_ties_infinities_and_nan(device, scores, data):
    budget = data.draw(st.integers(1, len(scores) - 1))
    head = data.draw(st.integers(0, budget))
    tail = data.draw(st.integers(0, budget - head))
    compare(torch.tensor([[scores]], device=device), budget, tail, head)


def test_views_and_empty(device):
    storage = torch.randn(2, 3, 50, device=device)
    compare(storage[:, :, 3:40], 11)
    compare(torch.randn(2, 50, 3, device=device).transpose(1, 2), 11)
    assert threshold_select(storage, 0).shape == (2, 3, 0)
    assert torch.equal(
        threshold_select(storage, 60), torch.arange(50, device=device).expand(2, 3, 50)
    )
