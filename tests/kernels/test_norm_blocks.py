import pytest
import torch

from locret.kernels import dense


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64)])
@pytest.mark.parametrize("elements", [1, 100, 128])
def test_blocks_are_normalised_as_the_whole(shape, elements, monkeypatch):
    x, weight = torch.randn(shape).bfloat16(), torch.randn(64).bfloat16()
    whole = dense.norm_reference(x, weight, 1e-5)
    monkeypatch.setattr(dense, "_CPU_ELEMENTS", elements)
    assert torch.equal(dense.norm_reference(x, weight, 1e-5), whole)
