"""lazymerge.json: where a merged model came from, and what its bytes are.

It is the last file a run writes: a folder that has it is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.json_file import read_json_mapping
from ..errors import InputError

MANIFEST_NAME = "lazymerge.json"
MANIFEST_FORMAT = 1

STATISTICS_NAME = "lazymerge-statistics.json"
"""What a run with --stats says of every tensor."""

MERGE_PATH = ".lazymerge/merge.json"
"""What an output is being made from, while it is not complete: the manifest's first half."""

CHECKSUM = "xxh3_128 of the xxh3_128 digests of the tensor's spans"
"""How a tensor's checksum is formed: spans, runs of as many elements as the manifest says, may be
finished in any order."""


def write_document(path: Path, contents: Mapping[str, Any], *, fsync: bool) -> None:
    """Writes a manifest, or the beginning of one, in one step."""
    document = {"format": MANIFEST_FORMAT, **contents}
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n", fsync=fsync)


MAX_DOCUMENT_BYTES = 500_000_000
"""Of a manifest: some 200 bytes for every tensor."""


_REMEDY = "It was damaged after lazymerge wrote it; --overwrite makes the output anew."


def read_document(path: Path) -> dict[str, Any]:
    """Reads what write_document wrote.

    Raises:
        InputError: it is absent, or not what a run writes.
    """
    document, _ = read_json_mapping(path, MAX_DOCUMENT_BYTES, remedy=_REMEDY)
    if document.get("format") != MANIFEST_FORMAT:
        raise InputError(f"{path} was not written by this version of lazymerge")
    return document


def count(value: object) -> int:
    """A number of bytes or tensors from a document.

    Raises:
        TypeError: it is none.
    """
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{str(value)[:40]!r} is no count")
    return value


def write_text(path: Path, text: str, *, fsync: bool) -> None:
    """As `write_bytes`, of a text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"), fsync=fsync)


def write_bytes(path: Path, content: bytes, *, fsync: bool) -> None:
    """Writes a small file so that it has either its old contents or all of the new.

    fsync: whatever happens to the machine: the contents are on disk before they get the name.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # of a run that was killed; or somebody's link
    with partial.open("xb") as stream:
        stream.write(content)
        if fsync:
            stream.flush()
            os.fsync(stream.fileno())
    partial.rename(path)
