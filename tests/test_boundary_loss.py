"""The loss with a term at the boundaries of compression, against sums in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locret.heads import targets
from locret.heads.targets import COMPRESSIONS, BoundaryLoss, regression
from locret.model.backbone import Backbone
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.tiny_models import prompt, tiny_heads, tiny_model

ROW = [Segment.single(29, 40)]


def scores(shape=(1, 2, 50), seed=0):
    """Predictions, which take gradients, and targets."""
    generator = torch.Generator().manual_seed(seed)
    predictions, wanted = torch.randn(2, *shape, generator=generator)
    return predictions.requires_grad_(True), wanted - 6


def softplus(x):
    return math.log1p(math.exp(x))


def naive_term(predictions, wanted, thresholds):
    total = 0.0
    for threshold in thresholds.tolist():
        for p, w in zip(predictions.flatten().tolist(), wanted.flatten().tolist(), strict=True):
            total += softplus(threshold - p) if w > threshold else softplus(p - threshold)
    return total / len(thresholds) / predictions.numel()


@pytest.fixture
def every_label(monkeypatch):
    monkeypatch.setattr(targets, "_EVERY", 1)


def test_the_first_row_has_smooth_l1_alone():
    loss, (predictions, wanted) = BoundaryLoss(), scores()
    assert torch.equal(loss(predictions, wanted), regression(predictions, wanted))


def test_later_rows_have_the_term_too():
    loss, (predictions, wanted) = BoundaryLoss(0.7), scores()
    loss(predictions, wanted)
    loss.end_row()
    predictions, wanted = scores(seed=1)
    term = naive_term(predictions, wanted, loss.thresholds)
    expected = regression(predictions, wanted).item() + 0.7 * term
    assert loss(predictions, wanted).item() == pytest.approx(expected, rel=1e-4)


def test_a_threshold_leaves_its_share_of_all_labels_above(every_label):
    """Of all heads and layers together: a head may keep all or nothing."""
    loss, low, high = BoundaryLoss(), scores((1, 1, 320)), scores((1, 2, 320), seed=1)
    for predictions, wanted in (low, (high[0], high[1] + 20)):
        loss(predictions, wanted)
    loss.end_row()
    labels = torch.cat([low[1].flatten(), high[1].flatten() + 20])
    for compression, threshold in zip(COMPRESSIONS, loss.thresholds, strict=True):
        assert (labels > threshold).float().mean() == pytest.approx(1 / compression, abs=2e-3)


def test_a_share_of_the_labels_is_enough():
    loss, (predictions, wanted) = BoundaryLoss(), scores((1, 4, 5000))
    loss(predictions, wanted)
    loss.end_row()
    for compression, threshold in zip(COMPRESSIONS, loss.thresholds, strict=True):
        assert (wanted > threshold).float().mean() == pytest.approx(1 / compression, abs=0.02)


def test_thresholds_are_the_mean_over_rows(every_label, monkeypatch):
    monkeypatch.setattr(targets, "_ROWS", 3)
    loss, expected = BoundaryLoss(), torch.zeros(len(COMPRESSIONS))
    for row in range(5):
        predictions, wanted = scores((1, 2, 64), seed=row)
        alone = BoundaryLoss()
        for each in (loss, alone):
            each(predictions, wanted)
            each.end_row()
        expected += (alone.thresholds - expected) / min(row + 1, 3)
    assert torch.allclose(loss.thresholds, expected)
    assert loss.rows == 5


def test_what_is_not_trained_on_changes_nothing():
    loss, (predictions, wanted) = BoundaryLoss(), scores()
    loss(predictions.detach(), wanted)
    loss.end_row()
    assert loss.rows == 0 and not loss.thresholds.any()


def test_its_state_goes_on_where_it_was():
    loss, (predictions, wanted) = BoundaryLoss(), scores()
    loss(predictions, wanted)
    loss.end_row()
    other = BoundaryLoss()
    other.load_state_dict(loss.state_dict())
    for each in (loss, other):
        each(*scores(seed=1))
        each.end_row()
    assert torch.equal(loss.thresholds, other.thresholds)
    assert torch.equal(loss(predictions, wanted), other(predictions, wanted))


@given(*[st.floats(-20, 20)] * 3)
def test_the_terms_of_two_units_bound_the_loss_of_their_pair(above, below, threshold):
    terms = softplus(threshold - above) + softplus(below - threshold)
    assert softplus(below - above) <= terms + 1e-9


def test_a_row_of_a_model_learns_from_the_thresholds_of_the_row_before(every_label):
    model = tiny_model("llama")
    heads = tiny_heads(model, label="log_max_prob").requires_grad_(True).train()
    options = {"keep_scores": True, "loss": "smooth_l1_boundary", "boundary_weight": 0.5}
    distillation = Distillation(Backbone(model), heads, **options)
    first, second = (distillation(prompt(40, seed=seed), ROW) for seed in (0, 1))
    labels = torch.cat([target.flatten() for target in first.targets]).sort().values
    thresholds = torch.stack([labels[round((len(labels) - 1) * (1 - 1 / r))] for r in COMPRESSIONS])
    for result, weight in ((first, 0), (second, 0.5)):
        layers = [
            regression(p, t).item() + weight * naive_term(p, t, thresholds)
            for p, t in zip(result.predictions, result.targets, strict=True)
        ]
        assert result.regression.item() == pytest.approx(sum(layers) / len(layers), rel=1e-4)
    loss = distillation.recipe.loss
    assert loss.rows == 2
    heads.eval()
    distillation(prompt(40, seed=2), ROW)
    assert loss.rows == 2


def test_a_loss_may_be_given_as_it_is():
    """So that whoever trains keeps its state."""
    model, loss = tiny_model("llama"), BoundaryLoss()
    heads = tiny_heads(model).requires_grad_(True).train()
    Distillation(Backbone(model), heads, loss=loss)(prompt(40), ROW).loss.backward()
    assert loss.rows == 1
