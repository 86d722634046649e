"""Which file a descriptor is of: not its name, which a copy or a backup may have taken over."""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from typing import Any

FileIdentity = tuple[int, int, int]
"""Device, inode, and when the file was made, in nanoseconds since 1970; 0 where that is not told.
The number of an inode alone would not do: it is given again when its file is gone."""

_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_STATX_BYTES = 256
_BTIME_OFFSET = 80
_MASK_OFFSET = 0


def file_identity(descriptor: int) -> FileIdentity:
    """The identity of an open file.

    Raises:
        OSError: the descriptor is not one.
    """
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, _made_ns(descriptor, status)


def _made_ns(descriptor: int, status: os.stat_result) -> int:
    """Source: Linux, statx(2); elsewhere Python knows."""
    seconds = getattr(status, "st_birthtime", None)
    if seconds is not None:
        return int(seconds * 1e9)
    statx = _statx()
    if statx is None:
        return 0
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_BTIME, answer) != 0:
        return 0
    (mask,) = struct.unpack_from("=I", answer, _MASK_OFFSET)
    if not mask & _STATX_BTIME:
        return 0
    whole, rest = struct.unpack_from("=qI", answer, _BTIME_OFFSET)
    return int(whole) * 1_000_000_000 + int(rest)


@cache
def _statx() -> Any:
    """The C library's function; None where there is none."""
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except (AttributeError, OSError, TypeError):
        return None
    statx.argtypes = [
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_void_p,
    ]
    statx.restype = ctypes.c_int
    return statx
