"""Last words after a bus error (bus_error.c): which mapped file got shorter, and how to go on."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from ...errors import printable
from .library import _library

_turn = Lock()


Watch = Callable[[int, str], None]
"""Has a mapped file, by its descriptor and path, named if it becomes shorter."""


@contextmanager
def explained_bus_errors(output: Path | str) -> Iterator[Watch]:
    """While this lasts, a bus error ends the process with a message and exit code 1. Without the
    native kernels Python's own says less: where the threads were.

    output: of the merge; the message says how to go on with it.

    Gives what to call for every file that is mapped. Files are closed when this has ended.
    """
    library = _library()
    if library is None:
        was_enabled = faulthandler.is_enabled()
        with suppress(OSError, ValueError, AttributeError, RuntimeError):  # stderr is no file
            faulthandler.enable()
        try:
            yield lambda descriptor, path: None
        finally:
            if not was_enabled:
                faulthandler.disable()
        return
    advice = (
        "\nwhat is finished is kept; with the file as it was, go on with: "
        f"lazymerge resume {shlex.quote(str(output))}\n"
    )
    with _turn:
        number = library.lm_bus_error_begin(printable(advice).encode())

    def watch(descriptor: int, path: str) -> None:
        if number >= 0:
            size = ctypes.c_int64(os.fstat(descriptor).st_size)
            with _turn:
                library.lm_bus_error_watch(number, descriptor, size, printable(path).encode())

    try:
        yield watch
    finally:
        if number >= 0:
            with _turn:
                library.lm_bus_error_end(number)
