"""What a quantization scheme is: how blocks of keys and a token's value become codes, and back.

A scheme knows nothing of caches. Keys are encoded a *block* at a time (up to `group` units
that follow each other, which share an entry of the tables), values a token at a time.

g units of a block, D head size. "..." is any shape.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from locret.quantities import check_whole, is_whole
from locret.quantization.codes import BITS, as_stored

Tensors = tuple[Tensor, ...]
"""Tensors that together hold codes or entries of tables, in an order that the scheme knows."""


@dataclass(frozen=True)
class Scheme:
    """How keys and values are stored. Subclasses implement the four methods.

    Attributes:
        bits: of a code, one of `widths`.
        group: units of a block of keys, and channels of a value group.
        residual: how many of the last units stay in full precision.
    """

    name: ClassVar[str]
    packs: ClassVar[bool] = True
    """False: nothing is ever encoded, and the methods are not called."""
    recordable: ClassVar[bool] = True
    """Whether a CUDA graph can hold the decode methods: they never wait for the device, and no
    shape depends on a value there. False: the tokens of an answer are decoded without a graph."""
    outliers: ClassVar[float | None] = None
    """Magnitude above which an element is stored as it is, beside the codes; None = never."""

    widths: ClassVar[tuple[int, ...]] = BITS
    """Bits that there are to choose from."""

    bits: int = 4
    group: int = 64
    residual: int = 16

    def __post_init__(self) -> None:
        self._check_width("bits")
        check_whole("group", self.group, 1)
        check_whole("residual", self.residual, 0)

    def _check_width(self, option: str) -> None:
        given = getattr(self, option)
        if not is_whole(given, 1) or given not in self.widths:
            raise ValueError(
                f"{option} is {given!r}; {self.name} takes {', '.join(map(str, self.widths))}"
            )

    def for_layer(self, layer: int) -> "Scheme":
        """The scheme of one layer."""
        return self

    def budgets(
        self, budget: int, num_layers: int, head_size: int, element_size: int = 2
    ) -> list[int]:
        """Units that each layer may keep when `budget` is what one keeps at `bits`."""
        return [budget] * num_layers

    def outlying_keys(self, x: Tensor) -> Tensor | None:
        """Which elements of blocks of keys [..., g, D] are stored as they are, bool like `x`."""
        return self.outlying_values(x)

    def outlying_values(self, x: Tensor) -> Tensor | None:
        """Which elements of values [..., D] are stored as they are, bool like `x`; None = none.
        What is not a number is none of them, so that encoding refuses it."""
        return None if self.outliers is None else as_stored(x).abs() > self.outliers

    def encode_keys(self, x: Tensor, usable: Tensor | None) -> tuple[Tensors, Tensors]:
        """Encode blocks of keys.

        Args:
            x: [..., g, D] floating, g units a block.
            usable: bool [..., g, D]; False where an outlier is stored elsewhere. None = all.

        Returns:
            What each unit needs, tensors [..., g, *], and each block's entries of the tables,
            tensors [..., *].

        Raises:
            ValueError: a value cannot be stored (see `codes.refuse_unstorable`).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement encode_keys()")

    def decode_keys(self, units: Tensors, tables: Tensors, head_size: int) -> Tensor:
        """float32 [..., D] from what each unit needs and its block's entries, both [..., *]."""
        raise NotImplementedError(f"{type(self).__name__} must implement decode_keys()")

    def encode_values(self, x: Tensor, usable: Tensor | None) -> Tensors:
        """Encode values [..., D], each unit for itself: tensors [..., *]. Raises as for keys."""
        raise NotImplementedError(f"{type(self).__name__} must implement encode_values()")

    def decode_values(self, units: Tensors, head_size: int) -> Tensor:
        """float32 [..., D] from what `encode_values` returned."""
        raise NotImplementedError(f"{type(self).__name__} must implement decode_values()")

    # Where kernels can do a layer at once. What they cannot, the methods above are asked for.

    def expand(
        self, packed: Tensors, starts: Tensor | None, out: Tensor, at: Tensor | None = None
    ) -> bool:
        """Whether a kernel wrote all keys or values of a layer.

        Args:
            packed: what each unit needs [N, *] and, of keys, the tables [M, *].
            starts: of the blocks of keys (`locret.quantization.packed.PackedKeys`); None = values.
            out: [*, D], floating.
            at: rows of `out` that the units go to, [N] long; None = all, in order.
        """
        return False

    def keys_at(
        self,
        packed: Tensors | None,
        block: Tensor | None,
        fresh: Tensor,
        index: Tensor,
        kept: Tensor,
        starts: Tensor,
    ) -> tuple[Tensors, Tensors] | None:
        """What `encode_keys` would return for all blocks at once: what each unit needs [K, *], and
        the tables [M, *]; None = no kernel can. Arguments are those of
        `locret.kernels.pack_rotated_keys`. ValueError: a key cannot be stored."""
        return None

    def values_at(self, packed: Tensors | None, fresh: Tensor, index: Tensor) -> Tensors | None:
        """The same of values, each unit for itself."""
        return None

    def units_at(
        self, packed: Tensors, block: Tensor | None, fresh: Tensor, index: Tensor
    ) -> Tensor | None:
        """float32 [K, D], keys (with `block`) or values in full; None = no kernel can."""
        return None

    def decodes_packed(self, head_size: int) -> bool:
        """Whether `kernel_form` has a form for packed units of that many channels."""
        return False

    def kernel_form(self, keys: Tensors, starts: Tensor, values: Tensors) -> Any:
        """Packed units as `locret.kernels.decode_packed` takes them: keys, what each needs [N, *]
        and the tables [M, *], the starts of their blocks, and values [N, *]."""
        raise NotImplementedError(f"{type(self).__name__} must implement kernel_form()")


@dataclass(frozen=True)
class NoScheme(Scheme):
    """Every unit stays as it is."""

    name = "none"
    packs = False
    widths = (16,)
    bits: int = 16
