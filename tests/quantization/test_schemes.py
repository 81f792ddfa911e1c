"""Every scheme: close to what went in, the same when done again, honest about bytes."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from locret.quantization import SCHEMES, make_scheme
from locret.quantization.base import Scheme
from locret.quantization.codes import LARGEST, STORAGE_ERROR, as_stored
from locret.quantization.packed import Expansion
from tests.quantization import naive
from tests.quantization.rectangles import Layer, quantize_keys, quantize_values

PACKING = sorted(name for name, scheme in SCHEMES.items() if scheme.packs)
PER_ELEMENT = [name for name in PACKING if name != "rotated"]
"""Schemes that round each element by itself; `test_rotated.py` has the bounds of the other."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(seed, shape, dtype, spread=1.0, outliers=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * spread
    x = x + torch.randn(shape[-1], generator=generator) * 3 * spread
    if outliers:
        x[torch.rand(shape, generator=generator) < 0.03] *= 20
    return x.clamp(-LARGEST / 2, LARGEST / 2).to(dtype)


@st.composite
def cases(draw, names=PER_ELEMENT):
    name = draw(st.sampled_from(names))
    options = {"group": draw(st.sampled_from([3, 8, 64])), "residual": 0}
    options["bits"] = draw(st.sampled_from(SCHEMES[name].widths))
    scheme = make_scheme(name, **options).for_layer(draw(st.integers(0, 8)))
    shape = [draw(st.integers(1, n)) for n in (2, 3, 40, 70)]
    x = tensors(
        draw(st.integers(0, 10**6)),
        shape,
        draw(st.sampled_from(DTYPES)),
        10.0 ** draw(st.integers(-3, 2)),
        draw(st.booleans()),
    )
    if draw(st.booleans()):
        x[..., : shape[-1] // 2] = draw(st.sampled_from([0.0, 1.5, -40.0]))
    return scheme, x, draw(st.sampled_from([quantize_keys, quantize_values]))


def groups(x, scheme, of_keys):
    """Largest - smallest of each value's group, outliers left out, like `x`."""
    span = torch.empty_like(x)
    size = scheme.group
    for start in range(0, x.shape[2] if of_keys else x.shape[3], size):
        at = (slice(None), slice(None), slice(start, start + size))
        at = at if of_keys else (*at[:2], slice(None), at[2])
        part = x[at]
        dim = 2 if of_keys else 3
        large = scheme.outlying_keys(part) if of_keys else scheme.outlying_values(part)
        large = torch.zeros_like(part).bool() if large is None else large
        low = part.masked_fill(large, torch.inf).amin(dim, keepdim=True)
        high = part.masked_fill(large, -torch.inf).amax(dim, keepdim=True)
        span[at] = (high - low).clamp(min=0).expand(part.shape)
    return span


def centres(x, group):
    """What fp8 subtracts from each key, like `x`: its block's mean per channel, in float16."""
    blocks = [block - block + block.mean(2, keepdim=True).half() for block in x.split(group, 2)]
    return torch.cat(blocks, 2)


@settings(max_examples=200)
@given(cases())
@example((make_scheme("kvquant", residual=0), torch.full((1, 1, 1, 8), 6.004), quantize_keys))
def test_error_is_within_the_bound(case):
    scheme, x, quantize = case
    stored = x.float() if scheme.name == "fp8" else as_stored(x)
    error = (quantize(scheme, x).dequantize(torch.float32) - stored).abs()
    if scheme.name == "fp8":
        away = stored - (centres(stored, scheme.group) if quantize is quantize_keys else 0)
        whole = away.abs().amax(2 if quantize is quantize_keys else 3, keepdim=True)
        bound = away.abs() * 2.0**-4 + (whole / 448).clamp(min=2.0**-14) * 2.0**-9
    else:
        step = groups(stored, scheme, quantize is quantize_keys) / (2**scheme.bits - 1)
        bound = step.clamp(min=2.0 ** (scheme.bits - 24)) * (0.5 + 2.0**-10) + STORAGE_ERROR
    if scheme.outliers is not None and quantize is quantize_keys:
        # A bias no larger than rounding makes of the largest that is none is taken for that one.
        bound = bound + (stored.abs() - scheme.outliers).clamp(0, scheme.outliers * 2.0**-10)
    assert (error <= bound + stored.abs() * 2.0**-20).all()


@settings(max_examples=200)
@given(cases())
def test_quantizing_again_changes_nothing(case):
    scheme, x, quantize = case
    if scheme.name == "fp8":  # rounding moves the mean of a block of keys
        quantize = quantize_values
    if scheme.name == "kvquant":  # without a bias, whose median rounding moves: one in a block
        x = x.clamp(-5, 5)
        x[..., 2 :: scheme.group, -1:] *= 10
    first = quantize(scheme, x)
    second = quantize(scheme, first.dequantize(x.dtype))
    for one, other in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(one, other)


@settings(max_examples=50)
@given(cases())
def test_bytes_are_those_of_the_tensors(case):
    scheme, x, quantize = case
    packed = quantize(scheme, x)
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in packed.tensors}
    real = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    assert sum(tensor.nbytes for tensor in packed.tensors) == real


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (64, 64), (63, 70), (130, 128), (65, 33)])
def test_kivi_is_what_its_formula_says(bits, tokens, size):
    x = tensors(3, (1, 1, tokens, size), torch.float16)
    scheme = make_scheme("kivi", bits=bits)
    keys = quantize_keys(scheme, x).dequantize(torch.float32)[0, 0]
    values = quantize_values(scheme, x).dequantize(torch.float32)[0, 0]
    assert torch.equal(keys, naive.kivi_keys(x[0, 0].float(), bits, 64))
    assert torch.equal(values, naive.kivi_values(x[0, 0].float(), bits, 64))


def test_a_large_channel_of_the_keys_hurts_no_other():
    x = tensors(0, (1, 2, 64, 16), torch.float16)
    scheme = make_scheme("kivi")
    calm = quantize_keys(scheme, x).dequantize(torch.float16)
    x[..., 5] *= 1000
    wild = quantize_keys(scheme, x).dequantize(torch.float16)
    others = [channel for channel in range(16) if channel != 5]
    assert torch.equal(calm[..., others], wild[..., others])


def test_a_large_token_of_the_values_hurts_no_other():
    x = tensors(0, (1, 2, 64, 16), torch.float16)
    scheme = make_scheme("kivi")
    calm = quantize_values(scheme, x).dequantize(torch.float16)
    x[:, :, 5] *= 1000
    wild = quantize_values(scheme, x).dequantize(torch.float16)
    others = [token for token in range(64) if token != 5]
    assert torch.equal(calm[:, :, others], wild[:, :, others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", [quantize_keys, quantize_values])
def test_kvquant_keeps_outliers_and_finer_steps(quantize, dtype):
    x = tensors(0, (2, 2, 64, 64), dtype) / 2
    x = x.clamp(-5.5, 5.5)
    x[0, 1, 7, 9], x[1, 0, 63, 0], x[1, 0, 63, 1] = 100.0, -6.5, 7.25
    kivi = quantize(make_scheme("kivi"), x).dequantize(dtype)
    packed = quantize(make_scheme("kvquant"), x)
    sparse = packed.dequantize(dtype)
    large = x.abs() > 6
    assert torch.equal(sparse[large], x[large]) and int(packed.outliers.counts.sum()) == 3
    assert (sparse - x)[0, 1].abs().max() < (kivi - x)[0, 1].abs().max() / 2


@pytest.mark.parametrize("units", [64, 40])
def test_a_biased_channel_has_few_outliers(units):
    """All that is 6 away from the channel's median, where that is an outlier itself."""
    x = tensors(0, (1, 2, units, 16), torch.float16).clamp(-5, 5)
    x[:, :, :, 3] = tensors(1, (1, 2, units), torch.float16).clamp(-5, 5) / 5 + 354
    x[0, 1, 7, 3], x[0, 0, 9, 3], x[0, 0, 9, 4] = 0.0, 370.0, -7.0
    packed = quantize_keys(make_scheme("kvquant", bits=8), x)
    assert packed.outliers.channels.tolist() == [3, 4, 3]
    assert packed.outliers.values.tolist() == [370, -7, 0]
    assert (packed.dequantize(torch.float32) - x).abs().max() < 0.15  # half of float16's step there


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("bias", [354.0, -111.0])
def test_a_large_bias_of_a_channel_hurts_no_key(name, bias):
    """Before RoPE a projection's bias is a constant a channel. Beside it only float16's, or a
    mean's, precision may be lost."""
    x = tensors(0, (1, 2, 128, 16), torch.float32)
    scheme = make_scheme(name).for_layer(0)
    plain = (quantize_keys(scheme, x).dequantize(torch.float32) - x).square().mean()
    x[..., 5] += bias
    biased = (quantize_keys(scheme, x).dequantize(torch.float32) - x).square().mean()
    assert biased < 1.1 * plain + 0.02


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("quantize", [quantize_keys, quantize_values])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 40000.0])
def test_what_cannot_be_stored_is_refused(name, quantize, bad):
    x = torch.zeros(1, 2, 5, 8)
    x[0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match="NaN, infinity or magnitudes above 32768"):
        quantize(make_scheme(name).for_layer(0), x)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kivy", {}, "no quantization 'kivy'; expected one of none, kivi"),
        ("kivi", {"bits": 3}, "bits is 3; kivi takes 2, 4, 8"),
        ("fp8", {"bits": 4}, "bits is 4; fp8 takes 8"),
        ("kivi", {"group": 0}, "group is 0"),
        ("kivi", {"residual": -1}, "residual is -1"),
        ("kivi", {"nbits": 4}, "'kivi' has no option nbits; it has bits, group, residual"),
        (
            "layerquant",
            {"quant_begin_layers": 5},
            "quant_end_layers is 4; expected a whole number of at least 5",
        ),
        ("layerquant", {"quant_layers_bits": 5}, "bits is 5"),
        ("layerquant", {"bits": [3, 2]}, "'kivi' has no option key_bits, value_bits"),
        ("layerquant", {"bits": {"key_bits": 3}}, "expected a number, or key_bits and value_bits"),
        ("layerquant", {"scheme": "layerquant"}, "scheme is 'layerquant'; layerquant needs one"),
        ("layerquant", {"scheme": "none"}, "layerquant needs one"),
        ("layerquant", {"scheme": "kivy"}, "no quantization 'kivy'"),
    ],
)
def test_wrong_choices_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_scheme(name, **options)


class WithoutWaiting(TorchDispatchMode):
    """Refuses what a device is waited for to do: to read a value there, or to learn a size."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        assert name not in self.WAITING, name
        masks = [x for x in args[1:2] if isinstance(x, list | tuple)] if name[:5] == "index" else []
        assert not any(torch.is_tensor(x) and x.dtype == torch.bool for x in sum(masks, [])), name
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("of_rows", [False, True])
def test_units_are_written_out_again_and_again_without_waiting(monkeypatch, name, of_rows):
    monkeypatch.setattr("locret.quantization.packed.SLAB", 16)
    x = tensors(0, (1, 2, 37, 16), torch.float16, outliers=True)
    scheme = make_scheme(name, group=8).for_layer(5)
    for pack in (quantize_keys, quantize_values):
        packed = pack(scheme, x).packed
        expected = packed.at(torch.arange(packed.count)).half()
        rows = torch.randperm(packed.count + 3)[: packed.count] if of_rows else None
        out = torch.full((packed.count + 3, 16), torch.nan).half()
        expansion = Expansion(packed, rows)
        for mode in (contextlib.nullcontext(), WithoutWaiting()):
            out.fill_(torch.nan)
            with mode:
                expansion.write(out)
            assert torch.equal(out[: packed.count] if rows is None else out[rows], expected)
            assert out.isnan().all(1).sum() == 3


def test_no_name_is_no_quantization():
    assert make_scheme(None) == make_scheme("none") and not make_scheme(None).packs


def test_a_scheme_is_one_short_class():
    @dataclass(frozen=True)
    class SignScheme(Scheme):
        """Signs of the keys, a size per channel; values in halves."""

        name = "sign"
        widths = (8,)
        bits: int = 8

        def encode_keys(self, x, usable):
            return ((x > 0).to(torch.uint8),), (x.abs().mean(-2).half(),)

        def decode_keys(self, units, rows, head_size):
            return (units[0].float() * 2 - 1) * rows[0].float()

        def encode_values(self, x, usable):
            return (x.half(),)

        def decode_values(self, units, head_size):
            return units[0].float()

    layer = Layer(SignScheme(group=4, residual=2))
    x = tensors(0, (1, 2, 40, 6), torch.float16)
    layer.append(x, x)
    layer.select(torch.arange(0, 40, 2).expand(1, 2, 20))
    keys, values = layer.dense()
    assert torch.equal(values, x[:, :, ::2])
    assert torch.equal(keys.sign(), x[:, :, ::2].sign())
