import pytest
import torch

from trainers.fit import RECALL_AT, HeadsModule
from trainers.module import TopOverlap


def naive_overlap(predictions, targets, fraction):
    shares = []
    for predicted, true in zip(predictions.flatten(0, 1), targets.flatten(0, 1), strict=True):
        top = max(1, round(fraction * len(true)))
        best = set(true.argsort(descending=True)[:top].tolist())
        shares.append(len(best & set(predicted.argsort(descending=True)[:top].tolist())) / top)
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("length", "fraction"), [(1, 0.1), (7, 0.5), (63, 0.1), (40, 1.0)])
def test_overlap_equals_the_naive_count(length, fraction):
    torch.manual_seed(0)
    predictions, targets = torch.randn(2, 3, length), torch.randn(2, 3, length)
    metric = TopOverlap(fraction)
    metric.update(predictions, targets)
    expected = naive_overlap(predictions, targets, fraction)
    assert metric.compute().item() == pytest.approx(expected)
    metric.update(targets, targets)
    assert metric.compute().item() == pytest.approx((expected + 1) / 2)


def test_figures_that_agree_on_the_first_batch_are_counted_apart():
    scores, truth = HeadsModule("any").val_scores, torch.arange(40.0).view(1, 1, -1)
    scores.update(truth, truth)
    scores.update(truth.roll(-3), truth)
    found = scores.compute()
    for fraction in RECALL_AT:
        expected = (1 + naive_overlap(truth.roll(-3), truth, fraction)) / 2
        assert found[f"val/recall_at_{fraction:.0%}"].item() == pytest.approx(expected)


def test_a_bad_fraction_is_refused():
    with pytest.raises(ValueError, match="fraction"):
        TopOverlap(0.0)
