"""Write new units in place at a slot that only the device knows, in one launch.

A captured CUDA graph can be replayed while the slot moves on.
"""

import torch
from torch import Tensor

from locret.kernels.dispatch import on_device, padded, takes_triton, tl, triton


def store_units(
    storage_keys: Tensor, storage_values: Tensor, key: Tensor, value: Tensor, slot: Tensor
) -> None:
    """Write T new units at the slots slot .. slot + T - 1, in place.

    Args:
        storage_keys, storage_values: [B, H, C, D], any strides.
        key, value: [B, H, T, D], of the storage's dtypes; T is small, 1 while decoding.
        slot: [1] int32 or int64, on the same device. All slots must lie in the storage: this
            cannot be checked without waiting for the device. A GPU drops what lies outside.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(storage_keys, key, slot)
    _check(storage_values, value, slot)
    if not takes_triton(storage_keys, storage_values, key, value, slot):
        store_units_reference(storage_keys, storage_values, key, value, slot)
    elif key.numel():
        _launch(storage_keys, storage_values, key, value, slot)


def store_units_reference(
    storage_keys: Tensor, storage_values: Tensor, key: Tensor, value: Tensor, slot: Tensor
) -> None:
    """The twin of `store_units`, in plain PyTorch."""
    slots = slot.long() + torch.arange(key.shape[2], device=slot.device)
    storage_keys.index_copy_(2, slots, key)
    storage_values.index_copy_(2, slots, value)


def _check(storage: Tensor, new: Tensor, slot: Tensor) -> None:
    same = storage.shape[:2] == new.shape[:2] and storage.shape[3:] == new.shape[3:]
    if storage.dim() != 4 or not same or storage.dtype != new.dtype:
        raise ValueError(
            f"new units {tuple(new.shape)} {new.dtype} do not fit storage "
            f"{tuple(storage.shape)} {storage.dtype}: expected [B, H, T, D] of the same dtype"
        )
    if slot.shape != (1,) or slot.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slot is {tuple(slot.shape)} {slot.dtype}; expected [1], int32 or int64")


def _launch(
    storage_keys: Tensor, storage_values: Tensor, key: Tensor, value: Tensor, slot: Tensor
) -> None:
    batch, heads, new, size = key.shape
    with on_device(key):
        _store[(new, heads, batch)](
            *(storage_keys, storage_values, key, value, slot),
            *(storage_keys.shape[2], size, value.shape[3]),
            *storage_keys.stride(),
            *storage_values.stride(),
            *key.stride(),
            *value.stride(),
            BLOCK=padded(max(size, value.shape[3])),
            num_warps=1,
        )


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    storage_keys,
    storage_values,
    key,
    value,
    slot,
    capacity,
    key_size,
    value_size,
    sk_b,
    sk_h,
    sk_s,
    sk_d,
    sv_b,
    sv_h,
    sv_s,
    sv_d,
    k_b,
    k_h,
    k_t,
    k_d,
    v_b,
    v_h,
    v_t,
    v_d,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK)
    at = tl.load(slot).to(tl.int64) + t + 0 * d
    inside = (at >= 0) & (at < capacity)
    a_key = tl.load(key + b * k_b + h * k_h + t * k_t + d * k_d, mask=d < key_size)
    a_value = tl.load(value + b * v_b + h * v_h + t * v_t + d * v_d, mask=d < value_size)
    storage_keys += b * sk_b + h * sk_h + at * sk_s + d * sk_d
    storage_values += b * sv_b + h * sv_h + at * sv_s + d * sv_d
    tl.store(storage_keys, a_key, mask=inside & (d < key_size))
    tl.store(storage_values, a_value, mask=inside & (d < value_size))
