"""Fused kernels in Triton, each beside its twin in plain PyTorch (`..._reference`).

A public function runs the Triton kernel where it can and its twin elsewhere (`dispatch`); both
agree. All of them may be captured in a CUDA graph: nothing waits for the device and no shape
depends on a value there. Shapes, dtypes and options that do not fit are refused with a ValueError
that names what does not. What kernels are not specialized for (`do_not_specialize`) differs from
prompt to prompt, or chunk to chunk: nothing is compiled anew for it, which takes seconds. This is
the lowest layer: it imports torch and, if there, triton.

Shapes: B batch, H KV heads, G query heads per KV head, S units, D head size.
"""

from locret.kernels.decode import Plain, decode_sequences, decode_shares, store_units
from locret.kernels.decode_packed import decode_packed, packed_shares
from locret.kernels.dense import add_norm, gated, gated_products, products
from locret.kernels.evict import gather_sequences, select_sequences
from locret.kernels.labels import highest_logits, highest_shares
from locret.kernels.pack_rotated import fetch_rotated, pack_rotated_keys, pack_rotated_values
from locret.kernels.packed import PackedKV, PackedShares, expand_floats, expand_units
from locret.kernels.packed_rotated import RotatedKV, expand_rotated
from locret.kernels.rotate import (
    HeadNorms,
    NewUnit,
    Tables,
    rotate_at_slots,
    rotate_units,
    store_rotated,
)
from locret.kernels.splits import Shares, merge_attention, share_out

__all__ = [
    "HeadNorms",
    "NewUnit",
    "PackedKV",
    "PackedShares",
    "Plain",
    "RotatedKV",
    "Shares",
    "Tables",
    "add_norm",
    "decode_packed",
    "decode_sequences",
    "decode_shares",
    "expand_floats",
    "expand_rotated",
    "expand_units",
    "fetch_rotated",
    "gated",
    "gated_products",
    "gather_sequences",
    "highest_logits",
    "highest_shares",
    "merge_attention",
    "pack_rotated_keys",
    "pack_rotated_values",
    "packed_shares",
    "products",
    "rotate_at_slots",
    "rotate_units",
    "select_sequences",
    "share_out",
    "store_rotated",
    "store_units",
]
