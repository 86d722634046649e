"""Vocabularies of two models compared: cheaply, since it is done before every merge.

Files of equal bytes are equal, and that is all there is to most models of one family. Of the others
the tokens are passed over one by one, without a parsed document: a document of 33 MB takes 230 MB,
and this takes 8 bytes for every token besides the file.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..output.checksum import file_checksum
from ..vocabulary.reading import TOKENIZER_NAME, has_file, read_file

MOST_BYTES = 40_000_000
"""Of a tokenizer.json that is looked into; the largest in use have 33 MB."""

MOST_TOKENS = 1 << 20
"""Numbers above it are not looked at; the largest vocabularies have 262,144."""

MOST_ADDED_BYTES = 4_000_000
"""Of the list of added tokens; thousands of them take one."""

_TEXT = rb'"([^"\\]*(?:\\.[^"\\]*)*)"'
_NUMBERED = re.compile(rb"[{,]\s*" + _TEXT + rb"\s*:\s*(\d{1,9})\s*", re.DOTALL)
_SCORED = re.compile(rb"[\[,]\s*\[\s*" + _TEXT + rb"\s*,\s*[-+.\deE]+\s*\]\s*", re.DOTALL)
_VOCABULARY = re.compile(rb'"vocab"\s*:\s*(?=[{\[])')
_ADDED = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two vocabularies differ.

    shared: numbers that stand for a token in both. differing: those of them that stand for another
    one. first: the lowest of these; None: there is none. sizes: numbers of tokens of both.
    """

    shared: int
    differing: int
    first: int | None
    sizes: tuple[int, int]


def compare_vocabularies(folder: str, other: str) -> Comparison | None:
    """How the vocabularies of two models' folders differ; None where they do not, or where one is
    missing, too large or no tokenizer."""
    try:
        if not (has_file(folder, TOKENIZER_NAME) and has_file(other, TOKENIZER_NAME)):
            return None
        if file_checksum(Path(folder, TOKENIZER_NAME)) == file_checksum(
            Path(other, TOKENIZER_NAME)
        ):
            return None
        first, second = _hashes(folder), _hashes(other)
    except (InputError, OSError):
        return None  # whoever needs it will say so
    if not first or not second:
        return None
    shared = differing = 0
    lowest = None
    for number, (one, another) in enumerate(zip(first, second, strict=False)):
        if one and another:
            shared += 1
            if one != another:
                differing += 1
                lowest = number if lowest is None else lowest
    sizes = tuple(len(each) - each.count(0) for each in (first, second))
    if not differing and sizes[0] == sizes[1]:
        return None
    return Comparison(shared, differing, lowest, (sizes[0], sizes[1]))


def count_tokens(folder: str) -> int | None:
    """How many tokens the tokenizer in a model's folder has; None where there is none that can be
    looked into."""
    try:
        found = _hashes(folder) if has_file(folder, TOKENIZER_NAME) else array("q")
    except (InputError, OSError):
        return None
    return len(found) - found.count(0) if found else None


def _hashes(folder: str) -> array[int]:
    """A number for the token of every number, 0 where there is none."""
    data = read_file(folder, TOKENIZER_NAME, MOST_BYTES)
    found = array("q")
    for token, number in (*_tokens(data), *_added(data)):
        if number >= MOST_TOKENS:
            continue
        if number >= len(found):
            found.frombytes(bytes(8 * (number + 1 - len(found))))
        found[number] = hash(token) or 1
    return found


def _tokens(data: bytes) -> Iterator[tuple[str, int]]:
    """The tokens of the tokenizer's model, with their numbers."""
    start = _VOCABULARY.search(data)
    if start is None:
        return
    is_mapping = data[start.end() : start.end() + 1] == b"{"
    expected = start.end()
    entries = (_NUMBERED if is_mapping else _SCORED).finditer(data, expected)
    for place, match in enumerate(entries):
        if match.start() != expected:
            return  # the vocabulary is over
        expected = match.end()
        text = _text(match[1])
        if text is not None:
            yield text, int(match[2]) if is_mapping else place


def _added(data: bytes) -> Iterator[tuple[str, int]]:
    """The tokens that are added to it."""
    start = _ADDED.search(data)
    if start is None:
        return
    part = data[start.end() : start.end() + MOST_ADDED_BYTES].decode("utf-8", "replace")
    try:
        entries, _ = json.JSONDecoder().raw_decode(part)
    except (ValueError, RecursionError):
        return
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            token, number = entry.get("content"), entry.get("id")
            if isinstance(token, str) and type(number) is int and number >= 0:
                yield token, number


def _text(raw: bytes) -> str | None:
    """A JSON string's text; None where it is none."""
    if b"\\" not in raw:
        return raw.decode("utf-8", "replace")
    try:
        text = json.loads(b'"' + raw + b'"')
    except (ValueError, RecursionError):
        return None
    return text if isinstance(text, str) else None
