"""Open what must be a regular file: no folder, no pipe that waits, no device without an end."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError


@contextmanager
def open_regular_file(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A file descriptor open for reading, and the file's status.

    Raises InputError naming the file when it is not a regular file or cannot be read, also for an
    OSError while it is open.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer. Regular files ignore it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(
                    f"{path}: is not a regular file. Put the file itself in its place."
                )
            yield descriptor, status
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror or error}. Make it readable, or download it "
            "again."
        ) from None


def read_exactly(descriptor: int, count: int, path: Path) -> bytes:
    """The next `count` bytes; unbuffered, so what is read from the file is what is returned.

    Raises InputError when the file ends before: it was shortened after its size was asked for.
    """
    parts = []
    missing = count
    while missing:
        part = os.read(descriptor, missing)
        if not part:
            raise InputError(
                f"{path}: became shorter while it was read. Try again when nothing writes to it."
            )
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
