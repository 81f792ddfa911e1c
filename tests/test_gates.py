"""Soft gates: which units stay, and how gates grow hard."""

import pytest
import torch

from locret.heads.quotas import quotas_of
from locret.training.branches import FLOOR, log_gates, log_mask, thresholds_for


@pytest.mark.parametrize("compression", [1.0, 1.3, 4.0, 1000.0])
def test_a_threshold_keeps_the_share_of_the_whole_model(compression):
    scores = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
    threshold = thresholds_for(scores, compression)
    assert threshold.shape == (1, 1, 1)
    assert (scores > threshold).sum() == max(1, round(300 / compression))


@pytest.mark.parametrize("compression", [1.0, 2.0, 9.0])
def test_thresholds_by_quotas_keep_each_heads_share(compression):
    scores = torch.randn(2, 2, 60, generator=torch.Generator().manual_seed(0))
    quotas = quotas_of([[2.0, 1.0], [0.5, 0.5]])
    thresholds = thresholds_for(scores, compression, quotas)
    assert thresholds.shape == (2, 2, 1)
    kept = (scores > thresholds).sum(dim=-1)
    assert kept.sum() == 4 * round(60 / compression)
    if compression > 2:
        assert kept[0, 0] == 14 and kept[0, 1] == 7


def test_gates_grow_hard_as_they_grow_cold():
    scores = torch.randn(2, 2, 60, generator=torch.Generator().manual_seed(0))
    threshold = thresholds_for(scores, 4.0)
    gates = log_gates(scores, threshold, 1e-6)
    assert torch.equal(gates, log_mask(scores, 4.0))
    assert torch.equal(gates, torch.where(scores > threshold, 0.0, FLOOR))
    assert log_gates(scores, threshold, 1.0).exp().median() > 0.1


@pytest.mark.parametrize("compression", [1.0, 2.0, 9.0])
def test_a_mask_keeps_the_best_though_many_are_equal(compression):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (2, 2, 60), generator=generator).float()
    mask = log_mask(scores, compression)
    assert (mask == 0).sum() == round(240 / compression)
    gone = scores[mask < 0]
    assert not gone.numel() or scores[mask == 0].min() >= gone.max()
    of_heads = log_mask(scores, compression, quotas_of([[2.0, 1.0], [0.5, 0.5]]))
    assert (of_heads == 0).sum() == 4 * round(60 / compression)
