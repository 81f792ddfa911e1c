import pytest
import torch

from locret.kernels.dense import (
    ACTIVATIONS,
    gated_products,
    gated_products_reference,
    products,
    products_reference,
)
from locret.kernels.fp8 import round_rows
from tests.kernels.close import assert_near


def drawn(*shape, device, dtype):
    return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype)


@pytest.mark.parametrize("sizes", [(5,), (16, 8, 8), (33, 1)])
@pytest.mark.parametrize("inputs", [40, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_twin(sizes, inputs, dtype, device):
    x = torch.randn(1, 1, inputs, device=device).to(dtype)
    weights = [drawn(n, inputs, device=device, dtype=dtype) for n in sizes]
    biases = [torch.randn(n, device=device).to(dtype) for n in sizes]
    for added in ([None] * len(sizes), biases):
        for ours, theirs in zip(
            products(x, weights, added), products_reference(x, weights, added), strict=True
        ):
            assert_near(ours, theirs)


@pytest.mark.parametrize("inputs", [40, 1500])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gated_kernel_equals_twin(inputs, activation, dtype, device):
    x = torch.randn(1, 1, inputs, device=device).to(dtype)
    both = drawn(2 * 21, inputs, device=device, dtype=dtype).chunk(2)
    assert_near(
        gated_products(x, *both, activation), gated_products_reference(x, *both, activation)
    )


def in_fp8(weights):
    """Codes and scales of rows."""
    return [*zip(*(round_rows(weight) for weight in weights), strict=True)]


@pytest.mark.parametrize("sizes", [(5,), (16, 8, 8)])
@pytest.mark.parametrize("inputs", [40, 2048, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_twin_in_fp8(sizes, inputs, dtype, device):
    x = torch.randn(1, 1, inputs, device=device).to(dtype)
    codes, scales = in_fp8([drawn(n, inputs, device=device, dtype=dtype) for n in sizes])
    biases = [torch.randn(n, device=device).to(dtype) for n in sizes]
    for added in ([None] * len(sizes), biases):
        given = x, codes, added, scales
        for ours, theirs in zip(products(*given), products_reference(*given), strict=True):
            assert_near(ours, theirs)


@pytest.mark.parametrize("inputs", [40, 3000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_kernel_equals_twin_in_fp8(inputs, activation, device):
    x = torch.randn(1, 1, inputs, device=device).bfloat16()
    both = [drawn(21, inputs, device=device, dtype=torch.bfloat16) for _ in range(2)]
    codes, scales = in_fp8(both)
    assert_near(
        gated_products(x, *codes, activation, scales),
        gated_products_reference(x, *codes, activation, scales),
    )


def test_what_is_refused(device):
    x, w = torch.ones(1, 1, 8, device=device), torch.ones(4, 8, device=device)
    with pytest.raises(ValueError, match="1 to 3 of both"):
        products(x, [w] * 4)
    with pytest.raises(ValueError, match=r"expected \[1, 1, K\]"):
        products(x.expand(2, 1, 8).contiguous(), [w])
    with pytest.raises(ValueError, match="all or none"):
        products(x, [w, w], [w[:, 0].contiguous(), None])
    with pytest.raises(ValueError, match="weight is"):
        products(x, [w.double()])
    with pytest.raises(ValueError, match="weight is torch.float32"):
        products(x, [w], scales=[w[:, :1].contiguous()])
    with pytest.raises(ValueError, match="scale is"):
        products(x, [round_rows(w)[0]], scales=[w[0]])
    with pytest.raises(ValueError, match="expected two of one shape"):
        gated_products(x, w, w, "tanh")
