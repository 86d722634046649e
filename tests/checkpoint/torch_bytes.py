"""Make torch files by hand, broken ones too: pickles instruction by instruction, zip files too."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

STORAGES = {"F32": "FloatStorage", "BF16": "BFloat16Storage", "I64": "LongStorage"}
ITEM_BYTES = {"F32": 4, "BF16": 2, "I64": 8}


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """BININT, or LONG1."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tuple_of(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def mapping(entries: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def storage(key: str = "0", count: int = 6, kind: str = "FloatStorage") -> bytes:
    """A persistent id and its reference."""
    parts = (text("storage"), name("torch", kind), text(key), text("cpu"), number(count))
    return tuple_of(*parts) + b"Q"


def tensor(
    shape: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
    offset: int = 0,
    stored: bytes | None = None,
    metadata: bytes = b"",
) -> bytes:
    """_rebuild_tensor_v2."""
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = (
        storage() if stored is None else stored,
        number(offset),
        tuple_of(*map(number, shape)),
        tuple_of(*map(number, stride)),
        b"\x89",
        hooks,
        metadata,
    )
    return name("torch._utils", "_rebuild_tensor_v2") + tuple_of(*arguments) + b"R"


DATA = struct.pack("<6f", *range(6))


def zipped(entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return stream.getvalue()


def torch_file(
    pickle: bytes, data: Mapping[str, bytes] | None = None, order: bytes | None = b"little"
) -> bytes:
    """A file as torch.save writes it, but for its padding."""
    entries = {"x/data.pkl": pickle}
    if order is not None:
        entries["x/byteorder"] = order
    contents = {"0": DATA} if data is None else data
    entries |= {f"x/data/{key}": content for key, content in contents.items()}
    return zipped(entries | {"x/version": b"3\n"})


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
