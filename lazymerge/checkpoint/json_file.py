"""Read a model's JSON files (config, shard index) as data, with limits and clear errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from .regular_file import open_regular_file, read_exactly

NESTING_LIMIT = 64
"""Mappings and lists within each other. Real configs have about five; code that walks a document
by recursion (copy.deepcopy) then never runs out of stack."""


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
    with open_regular_file(path) as (descriptor, status):
        if status.st_size > limit_bytes:
            raise InputError(
                f"{path}: holds {status.st_size:,} bytes; at most {limit_bytes:,} are read. "
                "It is not what its name says: download it again."
            )
        raw = read_exactly(descriptor, status.st_size, path)
    try:
        text = raw.decode("utf-8")
        document = json.loads(text, object_pairs_hook=object_pairs_hook)
        if "\\u" in text:
            # Escapes can spell half a surrogate pair, which could never be written out again.
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8. Download it again.") from None
    except UnicodeEncodeError:
        raise InputError(f"{path}: holds an unpaired surrogate (\\ud800 to \\udfff).") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: is not valid JSON: {error.msg}. "
            "Correct it, or download it again."
        ) from None
    except RecursionError:
        raise InputError(_explain_nesting(path)) from None
    except ValueError:  # Python's limit on the digits of an integer
        raise InputError(f"{path}: holds a number of thousands of digits.") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: is not a JSON mapping ({{...}}). Download it again.")
    if _nesting(document) > NESTING_LIMIT:
        raise InputError(_explain_nesting(path))
    return document, len(raw)


def _nesting(document: object) -> int:
    """How many mappings and lists lie within each other, counted up to just past the limit."""
    level = [document]
    depth = 0
    while level and depth <= NESTING_LIMIT:
        depth += 1
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)  # type: ignore[attr-defined]
            if isinstance(child, (dict, list))
        ]
    return depth


def _explain_nesting(path: Path) -> str:
    return f"{path}: is nested more than {NESTING_LIMIT} deep; no config or index is."
