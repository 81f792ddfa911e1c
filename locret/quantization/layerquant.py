"""LayerQuant (arXiv 2412.12706): some layers at other bits, and as many tokens as make up for it.

Layers quant_begin_layers .. quant_end_layers - 1 are stored at `quant_layers_bits`, the others at
`bits`, all by KIVI's formulas. A layer at more bits holds fewer tokens, so that every layer takes
the bytes it would take at `bits`. The published setting: 8 bits in the first 4 layers, 4 elsewhere.
"""

from dataclasses import dataclass

from locret.quantities import check_whole
from locret.quantization.base import Scheme
from locret.quantization.costs import most_bytes, units_within
from locret.quantization.kivi import KiviScheme
from locret.quantization.packing import check_bits


@dataclass(frozen=True)
class LayerQuantScheme(Scheme):
    """
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
