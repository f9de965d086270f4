"""Settings of this process on its host."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3), from glibc's malloc.h."""
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""DEFAULT_MMAP_THRESHOLD_MAX of 64-bit glibc; mallopt refuses more."""


_KEPT = (_LARGEST_MMAP_THRESHOLD, 2**31 - 1)
_GIVEN_BACK = (64 * 2**10, 0)
"""Values of the two: bytes from which on a block is mapped apart, and free bytes that the heap's end may keep."""


@contextmanager
def paused_collection() -> Iterator[None]:
    """Leave cyclic garbage alone for a while.

    A search makes millions of small objects without cycles; looking for cycles among them, with PyTorch's own
    objects in the heap, takes a third of its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def library_bytes() -> int:
    """Return the resident bytes of this process that lie in files: above all, the code of its libraries.

    Linux reads code from disk when it first runs; 0 where the system does not tell.
    """
    return int(getattr(psutil.Process().memory_info(), "shared", 0))


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory of tensors on the CPU instead of handing it back to the system.

    A training step allocates the same tensors again and again; returned pages would have to be mapped and cleared
    by the kernel at every step. Returns whether it is in force: glibc only, elsewhere nothing changes.
    """
    return _set(*_KEPT)


def give_back_freed_memory() -> bool:
    """Let the C library hand back to the system what is freed at the end of its heap, and all it has kept so far.

    What is freed between blocks in use still stays until :func:`trim_freed_memory`. Returns as
    :func:`keep_freed_memory`, which undoes it.
    """
    if not _set(*_GIVEN_BACK):
        return False
    trim_freed_memory()
    return True


def trim_freed_memory() -> None:
    """Hand all pages without a block in use back to the system (malloc_trim(3): glibc only)."""
    ctypes.CDLL(None).malloc_trim(0)


def _set(mmap_threshold: int, trim_threshold: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    values = ((_M_MMAP_THRESHOLD, mmap_threshold), (_M_TRIM_THRESHOLD, trim_threshold))
    done = [bool(mallopt(parameter, ctypes.c_int(value))) for parameter, value in values]
    return all(done)
