import pytest
import torch

from locret.kernels.dense import ACTIVATIONS, gated, gated_reference
from tests.kernels.close import assert_near


@pytest.mark.parametrize(("rows", "size"), [(3, 1), (3, 48), (3, 513), (65, 1500)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_twin(rows, size, activation, dtype, device):
    both = torch.randn(rows, 1, 2 * size, device=device).to(dtype) * 3
    halves = both.chunk(2, -1)
    actual = gated(*halves, activation)
    assert actual.is_contiguous()
    assert_near(actual, gated_reference(*halves, activation))
    gate, up = map(torch.clone, halves)
    assert torch.equal(gated(gate, up, activation), actual)
    gate, up = gate.contiguous(), up.contiguous()
    in_place = gated(gate, up, activation, gate)
    assert in_place is gate
    assert torch.equal(in_place, actual)
