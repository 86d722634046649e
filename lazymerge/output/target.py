"""Files that a person names to be written: pages, pictures, saved plans, logs.

A name mistyped or completed by the shell may be that of a model, a recipe or an output. So what is
there already is replaced only if it begins like what lazymerge writes there.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ..errors import InputError

LOOKED_AT_BYTES = 1 << 16


def check_target(path: Path, begins: bytes, holds: bytes = b"", *, option: str = "") -> None:
    """Checks that a file may be written.

    begins: what a file that is there must begin with, unless it is empty. holds: what must be
    near its beginning. option: that names it, for the message.

    Raises:
        InputError: something else is there, or it cannot be read.
    """
    where = f"{option}: {path}" if option else str(path)
    if str(path) == "-":
        raise InputError(f"{where} is not standard output here; name a file")
    try:
        if not os.path.lexists(path):
            return
        if not path.is_file():
            raise InputError(f"{where} is there, and is no file; choose another name")
        with path.open("rb") as stream:
            start = stream.read(LOOKED_AT_BYTES)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    if start and not (start.startswith(begins) and holds in start):
        raise InputError(
            f"{where} is there, and nothing that lazymerge has written for this; it is not "
            "replaced: choose another name, or remove it"
        )


def write_target(path: Path, text: str, begins: bytes, holds: bytes = b"") -> None:
    """Writes such a file, in one step.

    Raises:
        InputError: something else is there, or it cannot be written.
    """
    check_target(path, begins, holds)
    partial = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as stream:
            stream.write(text.encode("utf-8", "surrogatepass"))
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
