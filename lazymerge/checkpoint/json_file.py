"""Read a model's JSON files (config, shard index) as data, with limits and clear errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import InputError
from .regular_file import open_regular_file, read_exactly

NESTING_LIMIT = 64
"""Mappings and lists within each other. Real configs have about five; code that walks a document
by recursion (copy.deepcopy) then never runs out of stack."""

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


DOWNLOAD = "Download it again."


def most_values(raw: bytes) -> int:
    """An upper bound of the values and keys in a JSON text, found without parsing it.

    Each but the outermost value follows one of `,` `:` `[` `{`. Parsed, each takes up to 100 bytes
    beside its own text: that is how 100 MB of `[],[],` become 2.5 GB and minutes of work.
    """
    return sum(raw.count(mark) for mark in (b",", b":", b"[", b"{"))


def read_json_mapping(
    path: Path,
    limit_bytes: int,
    object_pairs_hook: Callable[[list[tuple[str, object]]], object] | None = None,
    *,
    limit_values: int | None = None,
    remedy: str = DOWNLOAD,
) -> tuple[dict[str, object], int]:
    """A JSON file's mapping, and the bytes read.

    NaN and Infinity are let pass: configs written by Python hold them (time_step_limit of mamba).

    limit_bytes: a larger file is refused before it is read.
    limit_values: a file that may hold more values and keys is refused before it is parsed.
    remedy: what a person can do about a damaged one.

    Raises InputError naming the file, and the line where the JSON is broken.
    """
    with open_regular_file(path) as (descriptor, status):
        if status.st_size > limit_bytes:
            raise InputError(
                f"{path}: holds {status.st_size:,} bytes; at most {limit_bytes:,} are read. "
                f"It is not what its name says. {remedy}"
            )
        raw = read_exactly(descriptor, status.st_size, path)
    return parse_json_mapping(
        raw, path, object_pairs_hook, limit_values=limit_values, remedy=remedy
    ), len(raw)


def parse_json_mapping(
    raw: bytes,
    path: Path,
    object_pairs_hook: Callable[[list[tuple[str, object]]], object] | None = None,
    *,
    limit_values: int | None = None,
    remedy: str = DOWNLOAD,
) -> dict[str, object]:
    """The mapping that a JSON file holds; path: of it, for messages. Limits and errors as of
    `read_json_mapping`."""
    if limit_values is not None and most_values(raw) > limit_values:
        raise InputError(
            f"{path}: holds more than {limit_values:,} values. It is not what its name says. "
            f"{remedy}"
        )
    try:
        text = raw.decode("utf-8")
        document = json.loads(text, object_pairs_hook=object_pairs_hook)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8. {remedy}") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: is not valid JSON: {error.msg}. {remedy}"
        ) from None
    except RecursionError:
        raise InputError(_explain_nesting(path, remedy)) from None
    except ValueError:  # Python's limit on the digits of an integer
        raise InputError(f"{path}: holds a number of thousands of digits. {remedy}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: is not a JSON mapping ({{...}}). {remedy}")
    if nesting(document) > NESTING_LIMIT:
        raise InputError(_explain_nesting(path, remedy))
    if has_unpaired_surrogate(text, document):
        raise InputError(
            f"{path}: holds an unpaired surrogate (\\ud800 to \\udfff), which is not text. {remedy}"
        )
    return document


def nesting(document: object) -> int:
    """How many mappings and lists lie within each other, counted up to just past the limit."""
    depth = 0
    for depth, _ in enumerate(_levels(document), 1):
        if depth > NESTING_LIMIT:
            break
    return depth


def has_unpaired_surrogate(text: str, document: object) -> bool:
    """Whether a string or key of a document has half a surrogate pair, spelt by an escape.

    Such text could never be written out again.

    text: what the document was parsed from; most hold no such escape, and are not walked.
    """
    return _SURROGATE_ESCAPE.search(text) is not None and any(
        _SURROGATE.search(part) for level in _levels(document) for part in _strings(level)
    )


def _levels(document: object) -> Iterator[list[object]]:
    """The mappings and lists of a document: the outermost, those in it, those in these, …"""
    level = [document]
    while level:
        yield level
        level = [
            child
            for parent in level
            for child in _children(parent)
            if isinstance(child, (dict, list))
        ]


def _children(parent: object) -> Iterator[object]:
    if isinstance(parent, dict):
        yield from parent.values()
    elif isinstance(parent, list):
        yield from parent


def _strings(level: list[object]) -> Iterator[str]:
    """The keys of mappings and the strings directly in mappings and lists."""
    for parent in level:
        if isinstance(parent, dict):
            yield from parent
        yield from (child for child in _children(parent) if isinstance(child, str))


def _explain_nesting(path: Path, remedy: str) -> str:
    return f"{path}: is nested more than {NESTING_LIMIT} deep; no config or index is. {remedy}"
