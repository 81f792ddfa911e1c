"""The schemes, and how a user names one.

- `kivi` (arXiv 2402.02750): keys per channel, values per token, asymmetric. A few channels of the
  keys are large in every token, so keys share a scale along tokens (section 3.2: groups of `group`
  units, one scale and minimum a channel). Values have no such channels and share a scale along the
  channels of one token, so that an error stays with its token. The last `residual` units stay in
  full precision (section 3.3).
- `kvquant` (arXiv 2401.18079, as set in arXiv 2412.12706): dense and sparse. Groups as in KIVI;
  values with |x| > 6 are kept as they are beside the codes, and have no say in their group's scale.
  Keys are held before RoPE (section 3.2): rotation mixes channels and so blurs what makes keys easy
  to quantize.
- `layerquant` (arXiv 2412.12706): some layers at other bits, and as many tokens as make up for it,
  so that every layer takes the bytes it would take at `bits`. The published setting: 8 bits in the
  first 4 layers, 4 elsewhere.
- `fp8`: 8-bit floats (e4m3) with a scale, keys per channel of a block, values per token.
  code = e4m3(x / scale), scale = largest |x| / 448, 448 being e4m3's largest number. Error: at most
  2 ** -4 of |x| or, near zero, 2 ** -10 of the scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from locret.kernels import expand_units
from locret.kernels.dispatch import takes_triton
from locret.quantities import check_whole
from locret.quantization.base import NoScheme, Scheme, Tensors
from locret.quantization.codes import (
    as_stored,
    check_bits,
    dequantize,
    pack,
    quantize,
    refuse_unstorable,
    unpack,
)
from locret.quantization.costs import most_bytes, units_within

E4M3_LAST = 448.0
SMALLEST_SCALE = 2.0**-14  # float16's smallest normal: below it a scale would lose precision
FAR_ABOVE_KEYS = 50.0  # of norms and projections as they are trained
LARGE_BIAS = 100  # times the typical one; Qwen2.5's largest is some 1,400 times, others up to 50


class KiviScheme(Scheme):
    """Of a key: codes uint8 [packed D] | scale, minimum float16 [D] a block.
    Of a value: codes uint8 [packed D], scale, minimum float16 [ceil(D / group)]."""

    name = "kivi"

    def encode_keys(self, x: Tensor, usable: Tensor | None) -> tuple[Tensors, Tensors]:
        codes, scale, minimum = quantize(x, self.bits, -2, usable)
        return (pack(codes, self.bits),), (scale.squeeze(-2), minimum.squeeze(-2))

    def decode_keys(self, units: Tensors, tables: Tensors, head_size: int) -> Tensor:
        return dequantize(unpack(units[0], self.bits, head_size), *tables)

    def encode_values(self, x: Tensor, usable: Tensor | None) -> Tensors:
        grouped = self._grouped(x)
        size = x.shape[-1]
        if usable is not None or grouped.numel() != x.numel():
            usable = self._grouped(x.new_ones(size).bool() if usable is None else usable)
        codes, scale, minimum = quantize(grouped, self.bits, -1, usable)
        codes = codes.flatten(-2)[..., :size]
        return pack(codes, self.bits), scale.squeeze(-1), minimum.squeeze(-1)

    def decode_values(self, units: Tensors, head_size: int) -> Tensor:
        codes, scale, minimum = units
        grouped = self._grouped(unpack(codes, self.bits, head_size))
        x = dequantize(grouped, scale[..., None], minimum[..., None])
        return x.flatten(-2)[..., :head_size]

    def expand(
        self, packed: Tensors, starts: Tensor | None, out: Tensor, at: Tensor | None = None
    ) -> bool:
        if at is not None or not takes_triton(out):
            return False
        expand_units(packed, self.bits, self.group, out, starts)
        return True

    def _grouped(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., groups, group], padded with zeros."""
        size = min(self.group, x.shape[-1])
        return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


class KVQuantScheme(KiviScheme):
    """Tensors as KIVI's; outliers besides, 3 bytes each and 1 a unit (4 and 2 from D = 256 on)."""

    name = "kvquant"
    keys_are = "unrotated"
    outliers = 6.0


@dataclass(frozen=True)
class LayerQuantScheme(Scheme):
    """Layers quant_begin_layers .. quant_end_layers - 1 are stored at `quant_layers_bits`, the
    others at `bits`, all by KIVI's formulas.

    Attributes:
        quant_layers_bits: bits of the layers that differ.
        quant_begin_layers, quant_end_layers: the first of them, and the first after them.
    """

    name = "layerquant"
    quant_layers_bits: int = 8
    quant_begin_layers: int = 0
    quant_end_layers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.quant_layers_bits)
        check_whole("quant_begin_layers", self.quant_begin_layers, 0)
        check_whole("quant_end_layers", self.quant_end_layers, self.quant_begin_layers)

    def for_layer(self, layer: int) -> Scheme:
        inside = self.quant_begin_layers <= layer < self.quant_end_layers
        return KiviScheme(
            self.quant_layers_bits if inside else self.bits, self.group, self.residual
        )

    def budgets(
        self, budget: int, num_layers: int, head_size: int, element_size: int = 2
    ) -> list[int]:
        if self.quant_end_layers > num_layers:
            raise ValueError(
                f"quant_end_layers is {self.quant_end_layers}; the model has {num_layers} layers"
            )
        base = KiviScheme(self.bits, self.group, self.residual)
        allowed = most_bytes(base, budget, head_size, element_size)
        schemes = [self.for_layer(layer) for layer in range(num_layers)]
        return [
            budget if each == base else max(units_within(each, allowed, head_size, element_size), 1)
            for each in schemes
        ]


@dataclass(frozen=True)
class Fp8Scheme(Scheme):
    """Of a key: codes uint8 [D] (e4m3 bits) | scale float16 [D] a block.
    Of a value: codes uint8 [D], scale float16 [1]."""

    name = "fp8"
    widths = (8,)
    bits: int = 8

    def encode_keys(self, x: Tensor, usable: Tensor | None) -> tuple[Tensors, Tensors]:
        codes, scale = _encode_e4m3(x, -2)
        return (codes,), (scale.squeeze(-2),)

    def decode_keys(self, units: Tensors, tables: Tensors, head_size: int) -> Tensor:
        return _decode_e4m3(*units, *tables)

    def encode_values(self, x: Tensor, usable: Tensor | None) -> Tensors:
        return _encode_e4m3(x, -1)

    def decode_values(self, units: Tensors, head_size: int) -> Tensor:
        return _decode_e4m3(*units)


def _encode_e4m3(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    x = as_stored(x)
    largest = x.abs().amax(dim, keepdim=True)
    refuse_unstorable(largest)
    scale = (largest / E4M3_LAST).clamp(min=SMALLEST_SCALE).half()
    steps = (x / scale.float()).clamp(-E4M3_LAST, E4M3_LAST)
    return steps.to(torch.float8_e4m3fn).view(torch.uint8), scale


def _decode_e4m3(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float() * scale.float()


def key_bias_warning(biases: Sequence[Tensor]) -> str | None:
    """Why keys may not survive the rounding: it is relative to a key's size, so that beside a large
    bias it takes away by what keys differ. None where no bias is large.

    Args:
        biases: what each layer's key projection adds, [H * D]; none where it adds nothing.
    """
    if not biases:
        return None
    largest = torch.stack([bias.detach().abs().max().float().cpu() for bias in biases])
    sizes = torch.cat([bias.detach().abs().float().cpu() for bias in biases])
    typical = sizes[sizes > 0].median()  # not a number where there are none, which is not large
    if largest.max() > LARGE_BIAS * typical:
        than = f"is {largest.max() / typical:.0f} times its typical one, {typical:.2g}"
    elif largest.max() > FAR_ABOVE_KEYS:
        than = "is far above what a token adds to a key, a few units"
    else:
        return None
    return (
        f"quantization 'fp8' keeps 4 significant bits of a key, its bias included, and the largest "
        f"key bias of this model, {largest.max():.3g}, {than}: what tells keys apart may be lost. "
        "Measured on "
        "Qwen2.5-Coder-1.5B, whose key biases are such: RULER needles found fell from 100 % to "
        "9.4 % with nothing evicted, and quantization 'kivi' of 8 and 4 bits kept 100 %; use it "
        "instead"
    )


Quantization = str | Mapping[str, Any] | Scheme | None
"""How a user names a scheme: its name; a mapping of `name` and options, {"name": "kivi", "bits":
2}; a scheme; None = no quantization."""

NO_SCHEME = NoScheme()

SCHEMES: dict[str, type[Scheme]] = {
    scheme.name: scheme
    for scheme in (NoScheme, KiviScheme, KVQuantScheme, LayerQuantScheme, Fp8Scheme)
}


def make_scheme(name: str | None, **options: Any) -> Scheme:
    """A scheme by name; None = "none".

    Raises:
        ValueError: there is no such scheme, or it has no such option or no such value of it.
    """
    name = name or NoScheme.name
    if name not in SCHEMES:
        raise ValueError(f"no quantization {name!r}; expected one of {', '.join(SCHEMES)}")
    known = [field.name for field in fields(SCHEMES[name])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"quantization {name!r} has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return SCHEMES[name](**options)


def scheme_of(given: Quantization) -> Scheme:
    """The scheme that a user means. 16 bits of any scheme are no quantization.

    Raises:
        ValueError: there is no such scheme, or it has no such option or no such value of it.
    """
    if isinstance(given, Scheme):
        return given
    if given is None or isinstance(given, str):
        return make_scheme(given)
    if not isinstance(given, Mapping) or "name" not in given:
        raise ValueError(
            f"quantization is {given!r}; expected one of {', '.join(SCHEMES)}, a mapping such as "
            "{'name': 'kivi', 'bits': 4}, or a scheme of locret.quantization"
        )
    options = dict(given)
    name = options.pop("name")
    if options.get("bits") == NO_SCHEME.bits:
        make_scheme(name)  # must exist all the same
        return NO_SCHEME
    return make_scheme(name, **options)


def describe_scheme(scheme: Scheme) -> dict[str, Any]:
    """Its name and options; of a scheme in `SCHEMES`, `scheme_of` makes it again."""
    return {"name": scheme.name} | asdict(scheme)
