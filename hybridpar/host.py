"""Settings of this process on its host."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3), from glibc's malloc.h."""
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""DEFAULT_MMAP_THRESHOLD_MAX of 64-bit glibc; mallopt refuses more."""


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory of tensors on the CPU instead of handing it back to the system.

    A training step allocates the same tensors again and again; returned pages would have to be mapped and cleared
    by the kernel at every step. Returns whether it is in force: glibc only, elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    largest = ctypes.c_int(2**31 - 1)
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, largest))
