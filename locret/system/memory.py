"""How the process keeps memory that it has freed: glibc's allocator gives large blocks back to the
system at once, and touching new ones costs more than what a CPU computes with them.
"""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of `mallopt`, as malloc.h has them
_KEPT = 2**28  # bytes at the end of the heap
_LARGE = 2**25  # bytes of a block from which on it is given back; glibc takes no more


def keep_freed_memory() -> bool:
    """Let freed memory be used again, but for blocks of 32 MiB and more. Returns whether the
    allocator has taken it: it is glibc's, and the environment sets none of its parameters."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE) and mallopt(_TRIM_THRESHOLD, _KEPT))
