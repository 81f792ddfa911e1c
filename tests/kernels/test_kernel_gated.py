import pytest
import torch

from locret.kernels.gated import ACTIVATIONS, gated, gated_reference
from tests.kernels.close import assert_near


@pytest.mark.parametrize("size", [1, 48, 513, 1500])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_twin(size, activation, dtype, device):
    both = torch.randn(3, 1, 2 * size, device=device).to(dtype) * 3
    halves = both.chunk(2, -1)
    actual = gated(*halves, activation)
    assert actual.is_contiguous()
    assert_near(actual, gated_reference(*halves, activation))
    assert torch.equal(gated(*map(torch.clone, halves), activation), actual)
