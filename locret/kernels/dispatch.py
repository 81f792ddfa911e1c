"""Which path a kernel takes: Triton on a GPU, the plain PyTorch twin elsewhere.

`TRITON_INTERPRET=1`, set before this package is imported, runs the Triton code on the CPU, slowly:
for tests.
"""

import contextlib
import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_HOPPER = 9  # major compute capability from which on a kernel may start before the last one ends


class _Missing:
    """Stands in for triton where it is not installed: kernels can be defined, not launched."""

    constexpr = Any

    @staticmethod
    def jit(function: Any = None, **_: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function


def _modules() -> tuple[Any, Any]:
    try:
        import triton
        import triton.language
    except ImportError:  # no wheels for this platform
        return _Missing(), _Missing()
    return triton, triton.language


triton, tl = _modules()
try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None
AVAILABLE = not isinstance(triton, _Missing)
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"


def takes_triton(*tensors: Tensor | None) -> bool:
    """Whether tensors, all on one device, go to the Triton kernel and not to the twin."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    assert len(devices) == 1, devices
    (device,) = devices
    return AVAILABLE and (device.type == "cuda" or (INTERPRETED and device.type == "cpu"))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the GPU that holds `tensor`, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 when interpreted on the CPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def early(tensor: Tensor) -> dict[str, bool]:
    """Keywords of a launch whose kernel may start before the one ahead of it in the stream has
    ended, where the device can: a step launches hundreds, each of a few microseconds.

    Such a kernel calls `start_next` first, and `wait_for_last` before it reads what any kernel has
    written, or writes anything. Without exception: the kernel behind it waits for it alone. So of
    two that may work side by side the first calls `start_next` after `wait_for_last`, and the
    second waits at its end.
    """
    if gdc_wait is None or not _overlaps(tensor.device):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@functools.cache
def _overlaps(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= _HOPPER


def padded(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`: blocks have such sizes."""
    return max(least, 1 << max(0, size - 1).bit_length())


def check_tensors(
    expected: Mapping[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]],
    contiguous: bool = True,
) -> None:
    """Refuse, by its name, a tensor of other dtype or shape or that is not contiguous."""
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        fits = tensor.dtype == dtype and tensor.shape == shape
        if not fits or (contiguous and not tensor.is_contiguous()):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} of strides {tensor.stride()}; "
                f"expected {dtype} {tuple(shape)}{', contiguous' * contiguous}"
            )


def check_numbers(sequences: int, named: Mapping[str, Tensor]) -> None:
    """Refuse what is not a number of each sequence, or one more of those called offsets."""
    for name, tensor in named.items():
        count = sequences + name.endswith("offsets")
        check_tensors({name: (tensor, torch.int32, (count,))})


@triton.jit
def start_next(EARLY: tl.constexpr):  # type: ignore[no-untyped-def, name-defined]
    """Let the next kernel of the stream start, once all programs of this one have."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(EARLY: tl.constexpr):  # type: ignore[no-untyped-def, name-defined]
    """Wait until the last kernel of the stream has ended and what it wrote can be read."""
    if EARLY:
        gdc_wait()


@triton.jit
def head_of(sequence, heads):  # type: ignore[no-untyped-def]
    """The row and the head of a sequence, int64."""
    return (sequence // heads).to(tl.int64), (sequence % heads).to(tl.int64)


@triton.jit
def units_at(tensor, strides, b, h, unit):  # type: ignore[no-untyped-def]
    """Where units begin in a tensor [B, H, S] or [B, H, S, D]."""
    return tensor + b * strides[0] + h * strides[1] + unit * strides[2]


@triton.jit
def row_of(rows, unit, there):  # type: ignore[no-untyped-def]
    """The row that each unit goes to, int64."""
    row = unit.to(tl.int64)
    if rows is not None:
        row = tl.load(rows + unit, mask=there, other=0)
    return row


@triton.jit
def blocks_of(  # type: ignore[no-untyped-def]
    starts, first, UNITS: tl.constexpr, blocks  # type: ignore[name-defined]
):  # fmt: skip
    """The blocks of the units first .. first + UNITS - 1, int32 [UNITS]."""
    # Where the first one is: the range that holds it shrinks 256-fold with each load.
    block = tl.full((), 0, tl.int32)
    left = blocks
    while left > 1:
        step = tl.cdiv(left, 256)
        i = tl.arange(0, 256) * step
        candidates = tl.load(starts + block + i, mask=i < left, other=2**31 - 1)
        found = (tl.sum((candidates <= first).to(tl.int32), 0) - 1) * step
        block += found
        left = tl.minimum(step, left - found)
    # No block is empty, so that the others are among the next ones.
    i = tl.arange(0, UNITS)
    following = block + 1 + i
    ends = tl.load(starts + following, mask=following < blocks, other=2**31 - 1)
    return block + tl.sum((ends[None, :] <= (first + i)[:, None]).to(tl.int32), 1)
