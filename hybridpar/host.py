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
_PLUG_BYTES, _MOST_PLUGS = _LARGEST_MMAP_THRESHOLD - 2**16, 4096
"""Just too small to be mapped apart; and an end, should the heap never grow."""
_KEPT = (_LARGEST_MMAP_THRESHOLD, 2**31 - 1)
_GIVEN_BACK = (64 * 2**10, 0)
"""Values of the two: bytes from which on a block is mapped apart, and free bytes that the heap's end may keep."""


_MALLINFO = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)
"""Fields of mallinfo2(3), in their order."""


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


class _Mallinfo(ctypes.Structure):
    """Figures of the C library's main heap: mallinfo2(3)."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def free_heap_bytes() -> int | None:
    """Return the bytes of the C library's heap that are free at the moment; None where it does not tell.

    Blocks that are mapped apart are no part of it. glibc from 2.33 on.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = _Mallinfo
    return int(library.mallinfo2().fordblks)


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


@contextmanager
def packed_heap() -> Iterator[None]:
    """Leave no hole in the heap for a large block, so that each is mapped apart, as in a process that trains.

    The C library fills a hole that is large enough before it maps a block. What is mapped apart has to be cleared
    by the kernel, a hole that was used before has not: 100 MB take a tenth of a second or nothing. While a model's
    activations are alive there is no such hole. Blocks that nobody touches fill them here; glibc only.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    library = ctypes.CDLL(None)
    library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
    library.sbrk.argtypes = [ctypes.c_ssize_t]
    library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    end, plugs = library.sbrk(0), list[int]()
    try:
        while library.sbrk(0) == end and len(plugs) < _MOST_PLUGS:
            plugs.append(library.malloc(_PLUG_BYTES))
        yield
    finally:
        for plug in plugs:
            library.free(plug)


def trim_freed_memory() -> None:
    """Hand all pages without a block in use back to the system (malloc_trim(3)); glibc only, elsewhere nothing."""
    if sys.platform.startswith("linux") and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


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
