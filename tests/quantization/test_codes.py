"""Affine groups: the error bound, exactness where it is promised, and idempotence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.quantization.codes import (
    LARGEST,
    STORAGE_ERROR,
    as_stored,
    dequantize,
    quantize,
    smallest_scale,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = st.sampled_from([2, 4, 8])


@st.composite
def groups(draw):
    """[N, g] groups of every kind: offsets, outliers, constants, tiny and large magnitudes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows, size = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    x = torch.randn(rows, size, generator=generator)
    x = x * 10.0 ** draw(st.integers(-7, 3))
    x = x + torch.randn(rows, 1, generator=generator) * 10.0 ** draw(st.integers(-7, 3))
    if draw(st.booleans()):
        x[torch.rand(x.shape, generator=generator) < 0.05] *= 30
    if draw(st.booleans()):
        x[torch.rand(rows, generator=generator) < 0.3] = draw(
            st.sampled_from([0.0, 1.0, -2.5, 1e-6])
        )
    if draw(st.booleans()):  # the boundaries of binades, where spacings change
        x = torch.sign(x) * 2.0 ** x.abs().clamp(min=1e-9).log2().round()
    return x.clamp(-LARGEST / 2, LARGEST / 2).to(draw(st.sampled_from(DTYPES)))


@settings(max_examples=300)
@given(x=groups(), bits=BITS)
def test_error_is_within_half_a_step(x, bits):
    codes, scale, minimum = quantize(x, bits, -1)
    restored = dequantize(codes, scale, minimum)
    stored = as_stored(x)
    bound = scale.float() / 2 * (1 + 1e-4) + STORAGE_ERROR
    rounding_of_math = 2.0**-22 * stored.abs().amax(-1, keepdim=True)
    assert ((restored - stored).abs() <= bound + rounding_of_math).all()
    assert ((stored - x.float()).abs() <= x.float().abs() * 2.0**-11 + STORAGE_ERROR).all()
    if x.dtype != torch.float32:
        assert ((stored - x.float()).abs() <= STORAGE_ERROR).all()


@settings(max_examples=300)
@given(x=groups(), bits=BITS)
def test_the_step_is_the_range_over_the_codes(x, bits):
    scale = quantize(x, bits, -1)[1].float()[..., 0]
    stored = as_stored(x)
    span = stored.amax(-1) - stored.amin(-1)
    ideal = (span / (2**bits - 1)).clamp(min=smallest_scale(bits))
    assert ((scale - ideal).abs() <= ideal * 2.0**-10 + STORAGE_ERROR).all()


@settings(max_examples=600)
@given(x=groups(), bits=BITS, through=st.sampled_from(["same", "float32"]))
def test_quantizing_again_changes_nothing(x, bits, through):
    first = quantize(x, bits, -1)
    dtype = x.dtype if through == "same" or x.dtype == torch.bfloat16 else torch.float32
    second = quantize(dequantize(*first).to(dtype), bits, -1)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("constant", [0.0, 1.0, -0.1, 300.0, -LARGEST])
def test_constants_are_exact(dtype, bits, constant):
    x = torch.full((3, 8), constant).to(dtype)
    restored = dequantize(*quantize(x, bits, -1))
    assert torch.equal(restored, as_stored(x))
    if dtype != torch.float32:
        assert torch.equal(restored.to(dtype), x)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_extremes_have_the_first_and_last_code(bits):
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    codes = quantize(x, bits, -1)[0]
    assert (codes.gather(-1, x.argmin(-1, keepdim=True)) == 0).all()
    assert (codes.gather(-1, x.argmax(-1, keepdim=True)) == 2**bits - 1).all()


def test_groups_run_along_the_given_axis():
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    codes, scale, minimum = quantize(x, 4, 1)
    assert codes.shape == x.shape and scale.shape == minimum.shape == (2, 1, 5)
    flipped = quantize(x.transpose(1, 2), 4, 2)
    assert torch.equal(flipped[0].transpose(1, 2), codes)


def test_unusable_values_do_not_widen_the_group():
    x = torch.tensor([[0.0, 1.0, 1000.0], [5.0, 5.0, 5.0]])
    usable = torch.tensor([[True, True, False], [False, False, False]])
    codes, scale, minimum = quantize(x, 4, -1, usable)
    restored = dequantize(codes, scale, minimum)
    assert ((restored - x)[0, :2].abs() <= 1 / 15 / 2 + 1e-4).all()
    assert torch.isfinite(restored).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), LARGEST * 1.01])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_cannot_be_stored_is_refused(bad, dtype):
    x = torch.zeros(4, 8)
    x[2, 3] = bad
    with pytest.raises(ValueError, match="NaN, infinity or magnitudes above 32768"):
        quantize(x.to(dtype), 4, -1)
