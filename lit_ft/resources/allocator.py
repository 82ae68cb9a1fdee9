"""glibc's allocator, told to keep freed memory: on a CPU that is a fifth of a training step.

Every activation above 128 KiB is otherwise mapped anew from the kernel, and its pages faulted in and zeroed, thousands
of times per step.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Serve large blocks from the heap and never trim it; returns whether the C library understood (glibc does)."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
