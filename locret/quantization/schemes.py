"""The schemes, and how a user names one.

- `kivi` (arXiv 2402.02750): keys per channel, values per token, asymmetric. A few channels of the
  keys are large in every token, so keys share a scale along tokens (section 3.2: groups of `group`
  units, one scale and minimum a channel). Values have no such channels and share a scale along the
  channels of one token, so that an error stays with its token. The last `residual` units stay in
  full precision (section 3.3).
- `kvquant` (arXiv 2401.18079, as set in arXiv 2412.12706): dense and sparse. Groups as in KIVI;
  elements with |x| > 6 are kept as they are beside the codes, and have no say in their group's
  scale. Of a channel of keys whose median in the block is beyond 6, the distance from it counts.
  The paper holds keys before RoPE (section 3.2), which mixes channels and so blurs what makes keys
  easy to quantize. Here they are rotated once an answer begins, as of any scheme: else every step
  would rotate all of them.
- `layerquant` (arXiv 2412.12706): some layers at other bits, and as many tokens as make up for it,
  so that every layer takes the bytes it would take at `bits`. The published setting: KIVI at 8 bits
  in the first 4 layers, at 4 elsewhere.
- `fp8`: 8-bit floats (e4m3) with a scale, keys per channel of a block, values per token.
  code = e4m3(x / scale), scale = largest |x| / 448, 448 being e4m3's largest number. Error: at most
  2 ** -4 of |x| or, near zero, 2 ** -10 of the scale. Of keys the block's mean is subtracted first:
  an error that is relative to a large bias (Qwen2.5: some channels are hundreds high) would take
  away what tells keys apart.
- `rotated`: 2, 3, 4 or 8 bits, nearly lossless from 3 on. Keys less their block's mean, and values,
  are rotated, with a scale a unit (`locret.quantization.codes`). Nobody has to rotate a unit back:
  <q, x> = <H q, zq> + <q, mean>, and a weighted sum of values is H (sum of weights * zq).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from locret.kernels import (
    E4M3,
    PackedKV,
    RotatedKV,
    expand_rotated,
    expand_units,
    fetch_rotated,
    pack_rotated_keys,
    pack_rotated_values,
)
from locret.kernels.dispatch import takes_triton
from locret.quantities import check_whole
from locret.quantization.base import NoScheme, Scheme, Tensors
from locret.quantization.blocks import most_bytes, units_within
from locret.quantization.codes import (
    PLANES,
    POSITIVE_LEVELS,
    as_stored,
    block_mean,
    block_median,
    decode_rotated,
    dequantize,
    encode_rotated,
    hadamard,
    pack,
    quantize,
    refuse_where,
    storable,
    unpack,
)

E4M3_LAST = 448.0
SMALLEST_SCALE = 2.0**-14  # float16's smallest normal: below it a scale would lose precision
KEY_AND_VALUE = ("key_bits", "value_bits")


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
        if takes_triton(out):
            expand_units(packed, self.bits, self.group, out, starts, at)
        return takes_triton(out)

    def decodes_packed(self, head_size: int) -> bool:
        return self.outliers is None

    def kernel_form(self, keys: Tensors, starts: Tensor, values: Tensors) -> PackedKV:
        return PackedKV(keys, starts, values, self.bits, self.group)

    def _grouped(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., groups, group], padded with zeros."""
        size = min(self.group, x.shape[-1])
        return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


class KVQuantScheme(KiviScheme):
    """Tensors as KIVI's; outliers besides, 3 bytes each and 1 a unit (4 and 2 from D = 256 on).

    A kernel that expands them leaves out the clamp: at most 2 ** -10 of an element near 6."""

    name = "kvquant"
    outliers: ClassVar[float] = 6.0

    def outlying_keys(self, x: Tensor) -> Tensor:
        """A channel whose median is an outlier has a bias (Qwen2.5: hundreds), and outliers are
        told by how far they are from it: else each key would have one there."""
        x = as_stored(x)
        median = block_median(x)
        return (x - median.where(median.abs() > self.outliers, 0)).abs() > self.outliers

    def decode_keys(self, units: Tensors, tables: Tensors, head_size: int) -> Tensor:
        x, (scale, minimum) = super().decode_keys(units, tables, head_size), tables
        top = minimum.float() + (2**self.bits - 1) * scale.float()
        # Where there is no bias, rounding must not make outliers of elements that were none.
        plain = (minimum >= -self.outliers) & (top <= self.outliers * (1 + 2.0**-10))
        return torch.where(plain, x.clamp(-self.outliers, self.outliers), x)

    def decode_values(self, units: Tensors, head_size: int) -> Tensor:
        return super().decode_values(units, head_size).clamp(-self.outliers, self.outliers)


Bits = int | tuple[int, int]
"""Bits of a code, or of a key's and of a value's."""


@dataclass(frozen=True)
class LayerQuantScheme(Scheme):
    """Layers quant_begin_layers .. quant_end_layers - 1 are stored at `quant_layers_bits`, the
    others at `bits`, all by the formulas of another scheme.

    Attributes:
        bits, quant_layers_bits: one number or, for a scheme that has them, those of keys and of
            values: {"key_bits": 3, "value_bits": 2}, which is kept as (3, 2).
        quant_begin_layers, quant_end_layers: the first of the layers that differ, and the first
            after them.
        scheme: the name of the other scheme.
    """

    name = "layerquant"
    bits: Bits = 4  # type: ignore[assignment]
    quant_layers_bits: Bits = 8
    quant_begin_layers: int = 0
    quant_end_layers: int = 4
    scheme: str = KiviScheme.name

    def __post_init__(self) -> None:
        for option in ("bits", "quant_layers_bits"):
            object.__setattr__(self, option, _bits_of(option, getattr(self, option)))
        check_whole("quant_begin_layers", self.quant_begin_layers, 0)
        check_whole("quant_end_layers", self.quant_end_layers, self.quant_begin_layers)
        if self.scheme in (self.name, NoScheme.name):
            raise ValueError(f"scheme is {self.scheme!r}; layerquant needs one that packs")
        for bits in (self.bits, self.quant_layers_bits):
            self._with_bits(bits)  # refuses what the other scheme does not take

    def for_layer(self, layer: int) -> Scheme:
        inside = self.quant_begin_layers <= layer < self.quant_end_layers
        return self._with_bits(self.quant_layers_bits if inside else self.bits)

    def budgets(
        self, budget: int, num_layers: int, head_size: int, element_size: int = 2
    ) -> list[int]:
        if self.quant_end_layers > num_layers:
            raise ValueError(
                f"quant_end_layers is {self.quant_end_layers}; the model has {num_layers} layers"
            )
        base = self._with_bits(self.bits)
        allowed = most_bytes(base, budget, head_size, element_size)
        schemes = [self.for_layer(layer) for layer in range(num_layers)]
        return [
            budget if each == base else max(units_within(each, allowed, head_size, element_size), 1)
            for each in schemes
        ]

    def _with_bits(self, bits: Bits) -> Scheme:
        """The other scheme at `bits`."""
        given = {"bits": bits}
        if isinstance(bits, tuple):
            given = dict(zip(KEY_AND_VALUE, bits, strict=True))
        return make_scheme(self.scheme, **given, group=self.group, residual=self.residual)


def _bits_of(option: str, given: Any) -> Bits:
    """One number as it is; a mapping, or what a file made of a pair, as a pair."""
    if isinstance(given, Mapping) and set(given) == set(KEY_AND_VALUE):
        return given["key_bits"], given["value_bits"]
    if isinstance(given, tuple | list) and len(given) == len(KEY_AND_VALUE):
        return given[0], given[1]
    if isinstance(given, Mapping | tuple | list):
        raise ValueError(f"{option} is {given!r}; expected a number, or key_bits and value_bits")
    check_whole(option, given, 1)
    return given


@dataclass(frozen=True)
class Fp8Scheme(Scheme):
    """Of a key: codes uint8 [D] (e4m3 bits) | scale, mean float16 [D] a block.
    Of a value: codes uint8 [D], scale float16 [1]."""

    name = "fp8"
    widths = (8,)
    bits: int = 8

    def encode_keys(self, x: Tensor, usable: Tensor | None) -> tuple[Tensors, Tensors]:
        x = storable(x)
        mean = block_mean(x).half()
        codes, scale = _encode_e4m3(x - mean.float(), -2)
        return (codes,), (scale.squeeze(-2), mean.squeeze(-2))

    def decode_keys(self, units: Tensors, tables: Tensors, head_size: int) -> Tensor:
        scale, mean = tables
        return _decode_e4m3(units[0], scale) + mean.float()

    def encode_values(self, x: Tensor, usable: Tensor | None) -> Tensors:
        return _encode_e4m3(storable(x), -1)

    def decode_values(self, units: Tensors, head_size: int) -> Tensor:
        return _decode_e4m3(*units)

    def expand(
        self, packed: Tensors, starts: Tensor | None, out: Tensor, at: Tensor | None = None
    ) -> bool:
        if takes_triton(out):
            expand_units(packed, E4M3, out.shape[-1], out, starts, at)
        return takes_triton(out)


def _encode_e4m3(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(dim, keepdim=True) / E4M3_LAST
    scale = scale.clamp(min=SMALLEST_SCALE).half()
    steps = (x / scale.float()).clamp(-E4M3_LAST, E4M3_LAST)
    return steps.to(torch.float8_e4m3fn).view(torch.uint8), scale


def _decode_e4m3(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float() * scale.float()


@dataclass(frozen=True)
class RotatedScheme(Scheme):
    """Of a key: codes uint8 [d], scale float16 [1] | mean bfloat16 [D] a block.
    Of a value: codes uint8 [d], scale float16 [1].

    Attributes:
        bits: a short form of both below; afterwards the larger of them.
        key_bits, value_bits: of a code: 2, 3, 4 or 8; 0 = `bits`.
    """

    name = "rotated"
    widths = tuple(PLANES)
    residual: int = 0  # so near to full precision, no unit is worth five of its size
    bits: int = 3
    key_bits: int = 0
    value_bits: int = 0

    def __post_init__(self) -> None:
        self._check_width("bits")
        for option in ("key_bits", "value_bits"):
            object.__setattr__(self, option, getattr(self, option) or self.bits)
            self._check_width(option)
        object.__setattr__(self, "bits", max(self.key_bits, self.value_bits))
        super().__post_init__()

    def encode_keys(self, x: Tensor, usable: Tensor | None) -> tuple[Tensors, Tensors]:
        x = storable(x)
        mean = block_mean(x).bfloat16()
        return encode_rotated(hadamard(x - mean.float()), self.key_bits), (mean.squeeze(-2),)

    def decode_keys(self, units: Tensors, tables: Tensors, head_size: int) -> Tensor:
        return hadamard(decode_rotated(units, self.key_bits, head_size)) + tables[0].float()

    def encode_values(self, x: Tensor, usable: Tensor | None) -> Tensors:
        return encode_rotated(hadamard(storable(x)), self.value_bits)

    def decode_values(self, units: Tensors, head_size: int) -> Tensor:
        return hadamard(decode_rotated(units, self.value_bits, head_size))

    def expand(
        self, packed: Tensors, starts: Tensor | None, out: Tensor, at: Tensor | None = None
    ) -> bool:
        bits = self.value_bits if starts is None else self.key_bits
        fused = self._fused(out)
        if fused:
            expand_rotated(packed, POSITIVE_LEVELS[bits], out, starts, at)
        return fused

    def keys_at(
        self,
        packed: Tensors | None,
        block: Tensor | None,
        fresh: Tensor,
        index: Tensor,
        kept: Tensor,
        starts: Tensor,
    ) -> tuple[Tensors, Tensors] | None:
        if not self._fused(fresh):
            return None
        levels = POSITIVE_LEVELS[self.key_bits]
        new, bad = pack_rotated_keys(packed, block, fresh, index, kept, starts, levels)
        refuse_where(bad)
        return new[:2], new[2:]

    def values_at(self, packed: Tensors | None, fresh: Tensor, index: Tensor) -> Tensors | None:
        if not self._fused(fresh):
            return None
        new, bad = pack_rotated_values(packed, fresh, index, POSITIVE_LEVELS[self.value_bits])
        refuse_where(bad)
        return new

    def units_at(
        self, packed: Tensors, block: Tensor | None, fresh: Tensor, index: Tensor
    ) -> Tensor | None:
        if not self._fused(fresh):
            return None
        bits = self.value_bits if block is None else self.key_bits
        return fetch_rotated(packed, block, fresh, index, POSITIVE_LEVELS[bits])

    def _fused(self, x: Tensor) -> bool:
        """Whether kernels read or write units [*, D] like `x`."""
        return takes_triton(x) and self.decodes_packed(x.shape[-1])

    def decodes_packed(self, head_size: int) -> bool:
        return head_size % 8 == 0

    def kernel_form(self, keys: Tensors, starts: Tensor, values: Tensors) -> RotatedKV:
        both = POSITIVE_LEVELS[self.key_bits], POSITIVE_LEVELS[self.value_bits]
        return RotatedKV(keys, starts, values, *both, self.group)


Quantization = str | Mapping[str, Any] | Scheme | None
"""How a user names a scheme: its name; a mapping of `name` and options, {"name": "kivi", "bits":
2}; a scheme; None = no quantization."""

NO_SCHEME = NoScheme()

SCHEMES: dict[str, type[Scheme]] = {
    scheme.name: scheme
    for scheme in (
        *(NoScheme, KiviScheme, KVQuantScheme, LayerQuantScheme, Fp8Scheme, RotatedScheme),
    )
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
    """The scheme that a user means. 16 bits of any scheme are no quantization. ValueError: there is
    no such scheme, or it has no such option or no such value of it."""
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
