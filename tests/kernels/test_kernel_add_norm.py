import pytest
import torch

from locret.kernels.dense import add_norm, add_norm_reference
from tests.kernels.close import assert_near


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 1), 4096), ((3, 1), 72), ((1, 1025), 6), ((0, 1), 8)]
)
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_twin(shape, size, adds, dtype, device):
    residual, new = torch.randn(2, *shape, size, device=device).to(dtype).unbind()
    given = residual, new if adds else None, torch.randn(size, device=device).to(dtype), 1e-5
    for actual, expected in zip(add_norm(*given), add_norm_reference(*given), strict=True):
        assert_near(actual, expected)
