"""Make safetensors files by hand, broken ones too, without the library under comparison."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1}

Shapes = Mapping[str, tuple[str, Sequence[int]]]
"""Dtype and shape by tensor name."""


def entry(dtype: object, shape: object, start: object, stop: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def entries_for(shapes: Shapes) -> tuple[dict[str, object], int]:
    """A header's mapping for tensors in the given order, and the bytes of the data section."""
    entries: dict[str, object] = {}
    position = 0
    for name, (dtype, shape) in shapes.items():
        stop = position + prod(shape) * ITEM_BYTES[dtype]
        entries[name] = entry(dtype, list(shape), position, stop)
        position = stop
    return entries, position


def with_prefix(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def write_file(path: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> int:
    """Write a sound file of zeros; returns the bytes before its data section."""
    entries, data_bytes = entries_for(shapes)
    if metadata is not None:
        entries = {"__metadata__": dict(metadata), **entries}
    header = json.dumps(entries).encode()
    path.write_bytes(with_prefix(header, bytes(data_bytes)))
    return 8 + len(header)
