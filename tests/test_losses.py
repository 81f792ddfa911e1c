"""Training losses, against sums in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.heads import targets as losses

SCORES = st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=12)


def smooth_l1(difference):
    size = abs(difference)
    return 0.5 * size * size if size < 1 else size - 0.5


@settings(max_examples=60)
@given(predictions=SCORES, shift=st.floats(-3, 3, width=32))
def test_regression_is_the_mean_smooth_l1(predictions, shift):
    ours = losses.regression(
        torch.tensor(predictions)[None, None],
        torch.tensor([p * shift for p in predictions])[None, None],
    )
    naive = sum(smooth_l1(p - p * shift) for p in predictions) / len(predictions)
    assert ours.item() == pytest.approx(naive, rel=1e-4, abs=1e-5)


@settings(max_examples=60)
@given(rows=st.lists(SCORES, min_size=1, max_size=3), dtype=st.sampled_from(["float32", "float64"]))
def test_smoothness_is_the_mean_squared_step(rows, dtype):
    length = min(map(len, rows))
    rows = [row[:length] for row in rows]
    ours = losses.smoothness(torch.tensor(rows, dtype=getattr(torch, dtype))[None])
    steps = [(b - a) ** 2 for row in rows for a, b in zip(row, row[1:], strict=False)]
    naive = sum(steps) / len(steps) if steps else 0.0
    assert ours.dim() == 0
    assert ours.item() == pytest.approx(naive, rel=1e-4, abs=1e-5)


def test_bfloat16_predictions():
    predictions = torch.linspace(-1, 1, 20).to(torch.bfloat16)[None, None]
    assert losses.smoothness(predictions).item() == pytest.approx((2 / 19) ** 2, rel=5e-2)
    assert losses.regression(predictions, predictions).item() == 0


def test_single_token_still_has_a_loss_to_differentiate():
    predictions = torch.ones(1, 2, 1, requires_grad=True)
    loss = losses.regression(predictions, torch.zeros(1, 2, 1)) + losses.smoothness(predictions)
    loss.backward()
    assert torch.isfinite(predictions.grad).all()


# --- listwise ---


def naive_listwise(predictions, targets):
    """Cross entropy of two softmaxes a row, mean over rows."""
    total = 0.0
    for predicted, wanted in zip(predictions, targets, strict=True):
        sums = [sum(math.exp(x) for x in row) for row in (predicted, wanted)]
        total -= sum(
            math.exp(w) / sums[1] * math.log(math.exp(p) / sums[0])
            for p, w in zip(predicted, wanted, strict=True)
        )
    return total / len(predictions)


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=4))
def test_listwise_is_the_mean_cross_entropy_of_the_orders(rows):
    length = min(len(row) for pair in rows for row in pair)
    predictions, targets = ([pair[side][:length] for pair in rows] for side in (0, 1))
    expected = naive_listwise(predictions, targets)
    for shape in ((1, len(rows), length), (len(rows), 1, length)):
        ours = losses.listwise(*(torch.tensor(x).reshape(shape) for x in (predictions, targets)))
        assert ours.dim() == 0
        assert ours.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_listwise_does_not_see_a_shift_of_a_whole_head():
    generator = torch.Generator().manual_seed(0)
    predictions, targets = torch.randn(2, 1, 3, 8, generator=generator)
    shifts = torch.tensor([-5.0, 0.0, 7.0])[None, :, None]
    once = losses.listwise(predictions, targets)
    assert torch.allclose(losses.listwise(predictions + shifts, targets), once, atol=1e-5)
    assert torch.allclose(losses.listwise(predictions, targets + shifts), once, atol=1e-5)


def disorder(predictions, targets):
    """Pairs of units of a head that stand the wrong way round."""
    steps = [x[..., :, None] - x[..., None, :] for x in (predictions, targets)]
    return int((steps[0] * steps[1] < 0).sum()) // 2


def test_following_the_gradient_of_listwise_puts_units_in_order():
    generator = torch.Generator().manual_seed(1)
    predictions, targets = torch.randn(2, 1, 2, 12, generator=generator)
    predictions.requires_grad_(True)
    found = [disorder(predictions, targets)]
    for _ in range(4):
        for _ in range(60):
            (gradient,) = torch.autograd.grad(losses.listwise(predictions, targets), predictions)
            with torch.no_grad():
                predictions -= 3 * gradient
        found.append(disorder(predictions, targets))
    assert found[0] > 20
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


def test_listwise_has_its_least_at_the_targets_themselves():
    targets = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(2))
    predictions = targets.clone().requires_grad_(True)
    loss = losses.listwise(predictions, targets)
    loss.backward()
    assert predictions.grad.abs().max() < 1e-6
    shares = targets.softmax(dim=-1)
    assert loss.item() == pytest.approx(-(shares * shares.log()).sum(-1).mean().item(), rel=1e-5)


def test_losses_by_name():
    plain = {"smooth_l1": losses.regression, "listwise": losses.listwise}
    assert plain | {"smooth_l1_boundary": losses.BoundaryLoss} == losses.LOSSES
    assert losses.make_loss("listwise") is losses.listwise
    assert losses.make_loss("smooth_l1_boundary", 0.7).weight == 0.7
