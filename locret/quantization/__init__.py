"""Quantized storage of keys and values. `docs/quantization.md` has the formulas and the layout.

To add a scheme, edit `schemes`, which has and names all of them; `base` is what a scheme has to do,
`codes` the arithmetic of codes, `blocks` which units share a block and what they cost, `packed` the
keys and values of a layer that any scheme packs.
"""

from locret.quantization.base import Scheme as Scheme
from locret.quantization.schemes import NO_SCHEME as NO_SCHEME
from locret.quantization.schemes import SCHEMES as SCHEMES
from locret.quantization.schemes import Quantization as Quantization
from locret.quantization.schemes import describe_scheme as describe_scheme
from locret.quantization.schemes import make_scheme as make_scheme
from locret.quantization.schemes import scheme_of as scheme_of
