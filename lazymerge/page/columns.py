"""Many names and numbers in little room.

A name is a pattern and the numbers in it: 90,000 names of a mixture of experts have some dozen
patterns. A column of numbers is told as differences of neighbours. What repeats is then left to
deflate, which the browser can undo by itself.
"""

from __future__ import annotations

import json
import re
import zlib
from base64 import b64encode
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,6})(?![0-9])", re.ASCII)
"""Numbers that are written the same again: without leading zeros, and short."""

_LEVEL = 6
"""Of deflate; 9 took twice the time for 2 % less."""


def differences(values: Iterable[int]) -> list[int]:
    """Every number less the one before it, the first as it is."""
    before, found = 0, []
    for value in values:
        found.append(value - before)
        before = value
    return found


def pack_names(names: Iterable[str]) -> dict[str, object]:
    """Names for JSON, as {"patterns": [[piece, ...]], "pattern": [...], "numbers": [[...], ...]}.

    A name is the pieces of its pattern with its numbers between them. `pattern` is a column of
    differences; `numbers` holds such a column for every pattern and place in it, in order.
    """
    known: dict[tuple[str, ...], int] = {}
    pattern: list[int] = []
    numbers: list[list[list[int]]] = []
    for name in names:
        pieces = tuple(_NUMBER.split(name))
        place = known.setdefault(pieces, len(known))
        if place == len(numbers):
            numbers.append([[] for _ in pieces[1:]])
        for column, text in zip(numbers[place], _NUMBER.findall(name), strict=True):
            column.append(int(text))
        pattern.append(place)
    return {
        "patterns": [list(pieces) for pieces in known],
        "pattern": differences(pattern),
        "numbers": [[differences(column) for column in columns] for columns in numbers],
    }


def unpack_names(packed: dict[str, object]) -> list[str]:
    """What pack_names was given: the definition of what the page does."""
    patterns: Sequence[Sequence[str]] = packed["patterns"]  # type: ignore[assignment]
    numbers: Sequence[Sequence[Sequence[int]]] = packed["numbers"]  # type: ignore[assignment]
    columns = [[iter(sums(column)) for column in columns] for columns in numbers]
    names = []
    for place in sums(packed["pattern"]):  # type: ignore[arg-type]
        pieces = patterns[place]
        text = pieces[0]
        for column, piece in zip(columns[place], pieces[1:], strict=True):
            text += f"{next(column)}{piece}"
        names.append(text)
    return names


def sums(column: Iterable[int]) -> list[int]:
    """What `differences` was given."""
    total, found = 0, []
    for value in column:
        total += value
        found.append(total)
    return found


def packed_text(document: object) -> str:
    """A document as base64 of raw deflate of JSON: nothing in it means anything to HTML."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = packer.compress(text.encode("ascii")) + packer.flush()
    return b64encode(data).decode("ascii")
