"""Files in memory (memfd_create) that stand for files that lie elsewhere: as large, and empty but
where something has been put."""

from __future__ import annotations

import mmap
import os
from typing import Any

from ..errors import LazymergeError
from .remote_inputs import Distant


def pages(start: int, stop: int) -> tuple[int, int]:
    """Offset and length of the whole pages that hold a byte range."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    return first, -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE - first


def empty_file(path: str, file: Distant) -> int:
    """A descriptor of a file in memory that stands for one that lies elsewhere. path: of that."""
    descriptor = os.memfd_create(os.path.basename(path)[:200], os.MFD_CLOEXEC)
    os.ftruncate(descriptor, file.size_bytes)
    return descriptor


def store(path: str, descriptor: int, piece: Any, offset: int) -> int:
    """Puts bytes in their place; returns where the next go.

    Raises:
        LazymergeError: there is no memory for them.
    """
    data = memoryview(piece).cast("B")
    while data:
        try:
            written = os.pwrite(descriptor, data, offset)
        except OSError as error:
            raise LazymergeError(
                f"{path}: no memory for what is fetched ({error.strerror}); give --memory "
                "less, or free some"
            ) from error
        data, offset = data[written:], offset + written
    return offset
