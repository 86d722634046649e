"""Last words after a bus error (bus_error.c): which mapped file got shorter, and how to go on."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from ...errors import printable
from .library import _library

_turn = Lock()


@contextmanager
def explained_bus_errors(output: Path) -> Iterator[None]:
    """While this lasts, a bus error ends the process with a message and exit code 1. Without the
    native kernels Python's own says less: where the threads were."""
    library = _library()
    if library is None:
        was_enabled = faulthandler.is_enabled()
        with suppress(OSError, ValueError, AttributeError, RuntimeError):  # stderr is no file
            faulthandler.enable()
        try:
            yield
        finally:
            if not was_enabled:
                faulthandler.disable()
        return
    advice = (
        "\nwhat is finished is kept; with the file as it was, go on with: "
        f"lazymerge resume {shlex.quote(str(output))}\n"
    )
    with _turn:
        is_installed = library.lm_bus_error_begin(printable(advice).encode()) == 0
    try:
        yield
    finally:
        if is_installed:
            with _turn:
                library.lm_bus_error_end()


def watch_for_bus_errors(descriptor: int, path: str) -> None:
    """Has a file named if it becomes shorter."""
    library = _library()
    if library is not None:
        size = ctypes.c_int64(os.fstat(descriptor).st_size)
        with _turn:
            library.lm_bus_error_watch(descriptor, size, printable(path).encode())
