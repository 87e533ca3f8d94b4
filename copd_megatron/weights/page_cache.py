"""What the operating system keeps of files in memory, so that reading a model once does not push out everything else.

Pages of files that nobody had in memory are given back as soon as they have been used. The system then takes the same
few pages again and again, which is also faster than finding new ones. Files that were in memory before stay there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress

import numpy


def in_memory(handle: int) -> float:
    """The share of an open file's pages that are in memory (Linux); 1 where the system does not tell."""
    size = os.fstat(handle).st_size
    if size == 0:
        return 1.0
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with suppress(OSError, ValueError, AttributeError), mmap.mmap(handle, size, prot=mmap.PROT_READ) as mapped:
        view = numpy.frombuffer(mapped, dtype=numpy.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        del view  # a mapping that is looked at cannot be closed
        if ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), pages) == 0:
            return bytes(pages).translate(_LAST_BIT).count(1) / len(pages)
    return 1.0


def give_back(handle: int, start: int, size: int) -> None:
    """Pages that lie wholly in the bytes start … start + size need not stay in memory. Those that have been written
    begin their way to the disk."""
    with suppress(OSError):  # advice that a file system does not take
        os.posix_fadvise(handle, start, size, os.POSIX_FADV_DONTNEED)


_LAST_BIT = bytes(value & 1 for value in range(256))
