"""Training losses, against sums in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret import losses

SCORES = st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=12)


def smooth_l1(difference):
    size = abs(difference)
    return 0.5 * size * size if size < 1 else size - 0.5


@settings(max_examples=60, deadline=None)
@given(predictions=SCORES, shift=st.floats(-3, 3, width=32))
def test_regression_is_the_mean_smooth_l1(predictions, shift):
    ours = losses.regression(
        torch.tensor(predictions)[None, None],
        torch.tensor([p * shift for p in predictions])[None, None],
    )
    naive = sum(smooth_l1(p - p * shift) for p in predictions) / len(predictions)
    assert ours.item() == pytest.approx(naive, rel=1e-4, abs=1e-5)


@settings(max_examples=60, deadline=None)
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
