"""KVQuant-style dense-and-sparse storage (arXiv 2401.18079, as set in arXiv 2412.12706).

Groups as in KIVI; values with |x| > 6 are kept as they are beside the codes, and have no say in
their group's scale. Keys are held before RoPE (section 3.2): rotation mixes channels and so blurs
what makes keys easy to quantize.
"""

from locret.quantization.kivi import KiviScheme


class KVQuantScheme(KiviScheme):
    """Parts as KIVI's; outliers besides, 3 bytes each and 1 a unit (4 and 2 from D = 256 on)."""

    name = "kvquant"
    keys_are = "unrotated"
    outliers = 6.0
