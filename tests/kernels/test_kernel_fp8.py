import pytest
import torch

from locret.kernels.dispatch import INTERPRETED
from locret.kernels.fp8 import round_rows, round_rows_reference


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("size", [16, 96, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_twin(rows, size, dtype, device):
    x = (torch.randn(rows, size, device=device) * torch.rand(rows, 1, device=device)).to(dtype)
    codes, scales = round_rows(x)
    expected, of_rows = round_rows_reference(x)
    assert torch.equal(scales, of_rows)
    codes, expected = codes.float(), expected.float()
    if INTERPRETED:  # it rounds ties away from zero and loses carries into the exponent
        sure = expected.abs().clamp(min=2**-6).frexp().mantissa != 0.5
        assert ((codes - expected).abs() <= expected.abs() / 8)[sure].all()
    else:
        assert torch.equal(codes, expected)


def test_each_row_has_its_own_scale(device):
    x = torch.tensor([[448.0, -1.0, 0.5], [0.0, 0.0, 0.0], [-896.0, 2.0, 1000.0]], device=device)
    codes, scales = round_rows(x)
    assert codes.float()[0].tolist() == [448.0, -1.0, 0.5]
    assert not codes.float()[1].any() and codes.float().isfinite().all()
    assert (codes.float() * scales - x).abs().max() < 1000 / 16
    assert scales.shape == (3, 1) and scales[2].item() == pytest.approx(1000 / 448)


@pytest.mark.skipif(INTERPRETED, reason="its casts know no NaN")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad, device):
    x = torch.ones(2, 64, device=device)
    x[0, 5] = bad
    codes, scales = round_rows(x)
    assert (codes.float() * scales)[0, 5].isnan()
    assert torch.allclose((codes.float() * scales)[1], x[1])


def test_nothing_is_rounded_of_no_rows(device):
    codes, scales = round_rows(torch.zeros(0, 32, device=device))
    assert codes.shape == (0, 32) and scales.shape == (0, 1)


def test_what_is_refused(device):
    with pytest.raises(ValueError, match="contiguous"):
        round_rows(torch.zeros(32, 16, device=device).t())
