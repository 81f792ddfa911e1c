"""Fused kernels in Triton, each beside its twin in plain PyTorch (`..._reference`).

A public function runs the Triton kernel where it can and its twin elsewhere (`dispatch`); both
agree. All of them may be captured in a CUDA graph: nothing waits for the device and no shape
depends on a value there. Shapes, dtypes and options that do not fit are refused with a ValueError
that names what does not. What kernels are not specialized for (`do_not_specialize`) differs from
prompt to prompt, or chunk to chunk: nothing is compiled anew for it, which takes seconds. Triton
specializes for every number in a tuple, so that none of these is in one. This is the lowest layer:
it imports torch and, if there, triton.

`decode` attends from one token, `packed` expands a chunk's units, `rotate` stores and rotates,
`select` says which units stay, `gather` moves them, `dense` is what surrounds products, `fp8`
rounds what goes into those in FP8, `splits`
shares work out and merges it, `labels` are for training.

Shapes: B batch, H KV heads, G query heads per KV head, S units, D head size.
"""

from locret.kernels.decode import Plain as Plain
from locret.kernels.decode import decode_packed as decode_packed
from locret.kernels.decode import decode_sequences as decode_sequences
from locret.kernels.decode import decode_shares as decode_shares
from locret.kernels.decode import packed_shares as packed_shares
from locret.kernels.decode_general import PackedShares as PackedShares
from locret.kernels.dense import HeadNorms as HeadNorms
from locret.kernels.dense import add_norm as add_norm
from locret.kernels.dense import gated as gated
from locret.kernels.dense import gated_products as gated_products
from locret.kernels.dense import products as products
from locret.kernels.fp8 import round_rows as round_rows
from locret.kernels.gather import gather_sequences as gather_sequences
from locret.kernels.labels import highest_logits as highest_logits
from locret.kernels.labels import highest_shares as highest_shares
from locret.kernels.pack_rotated import fetch_rotated as fetch_rotated
from locret.kernels.pack_rotated import pack_rotated_keys as pack_rotated_keys
from locret.kernels.pack_rotated import pack_rotated_values as pack_rotated_values
from locret.kernels.packed import E4M3 as E4M3
from locret.kernels.packed import PackedKV as PackedKV
from locret.kernels.packed import RotatedKV as RotatedKV
from locret.kernels.packed import expand_rotated as expand_rotated
from locret.kernels.packed import expand_units as expand_units
from locret.kernels.rotate import NewUnit as NewUnit
from locret.kernels.rotate import Tables as Tables
from locret.kernels.rotate import rotate_at_slots as rotate_at_slots
from locret.kernels.rotate import rotate_units as rotate_units
from locret.kernels.rotate import store_rotated as store_rotated
from locret.kernels.rotate import store_units as store_units
from locret.kernels.select import select_sequences as select_sequences
from locret.kernels.splits import Shares as Shares
from locret.kernels.splits import merge_attention as merge_attention
from locret.kernels.splits import share_out as share_out
