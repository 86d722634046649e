"""Holes in files in memory: their pages are given back, and the file stays as long as it is."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import cache
from typing import cast

from ..errors import LazymergeError

_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # linux/falloc.h


@cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    call.restype = ctypes.c_int
    return cast("Callable[[int, int, int, int], int]", call)


def make_hole(descriptor: int, start: int, length: int) -> None:
    """Gives the memory of whole pages back.

    start: in bytes, a multiple of a page. length: in bytes; the last page goes as a whole.

    Raises:
        LazymergeError: the system cannot.
    """
    length = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
    if _fallocate()(descriptor, _PUNCH_HOLE | _KEEP_SIZE, start, length):
        error = ctypes.get_errno()
        raise LazymergeError(f"cannot give memory back: {os.strerror(error)}")
