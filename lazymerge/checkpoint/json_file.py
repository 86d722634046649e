"""Read a model's JSON files (config, shard index) as data, with a size limit and clear errors."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

from lazymerge.errors import InputError


def read_json_mapping(
    path: Path,
    limit_bytes: int,
    object_pairs_hook: Callable[[list[tuple[str, object]]], object] | None = None,
) -> tuple[dict[str, object], int]:
    """A JSON file's mapping, and the bytes read.

    NaN and Infinity are let pass: configs written by Python hold them (time_step_limit of mamba).

    limit_bytes: a larger file is refused before it is read.

    Raises InputError naming the file, and the line where the JSON is broken.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer. Regular files ignore it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path}: is not a regular file.")
            if status.st_size > limit_bytes:
                raise InputError(
                    f"{path}: holds {status.st_size:,} bytes; at most {limit_bytes:,} are read. "
                    "It is not what its name says: download it again."
                )
            raw = stream.read(limit_bytes)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from None
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=object_pairs_hook)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8. Download it again.") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: is not valid JSON: {error.msg}. "
            "Correct it, or download it again."
        ) from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply to be read.") from None
    except ValueError:
        raise InputError(f"{path}: holds a number of thousands of digits.") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: is not a JSON mapping ({{...}}). Download it again.")
    return document, len(raw)
