"""Where the entries of a zip file lie, checked so that their bytes can be read where they are.

    local header, name, extra │ content │ …    central directory    (zip64 end, locator)    end
    0                                          │ one record an entry                         size

The central directory counts; every local header is checked against it, since the content begins
where the local header ends. The zip64 records are there in files of torch, and else where a number
needs more than 32 bits.

Stricter than the format: nothing before the first entry and nothing after the end, no comment of
the file (with one, two places could be the end), no entry compressed, encrypted, twice, in another
entry's bytes, or named like a path out of a folder. Content is not read, so checksums of content
are not compared: torch may leave them out (torch.serialization.set_crc32_options).

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from .broken_file import DAMAGED, INCOMPLETE, BrokenFileError
from .scattered import ScatteredBytes
from .wording import quoted

END_BYTES = 1 << 16
"""Of a file, looked at first: the directories of 500 entries are smaller."""

DIRECTORY_LIMIT_BYTES = 100_000_000
ENTRY_LIMIT = 400_000
"""An entry a tensor, at most. The models with the most tensors have about 140,000."""

_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_CENTRAL = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END = struct.Struct("<4sHHHHLLH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQHHLLQQQQ")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_CENTRAL_SIGNATURE = b"PK\x01\x02"
_END_SIGNATURE = b"PK\x05\x06"
_END64_LOCATOR_SIGNATURE = b"PK\x06\x07"
_END64_SIGNATURE = b"PK\x06\x06"
_ZIP64_EXTRA = 1
_VERSION_OF_ZIP64 = 45
_SIZES_FOLLOW, _NAME_IS_UTF8 = 1 << 3, 1 << 11
_IN_ZIP64 = 0xFFFFFFFF
_IN_ZIP64_SHORT = 0xFFFF


@dataclass(frozen=True, slots=True)
class ZipDirectory:
    """The entries of a zip file.

    entries: byte range of the content, start and stop_exclusive within the file, by name.
    digest: xxh3-128 of everything that this was learnt from.
    bytes_read: bytes read from the file for it.
    """

    entries: dict[str, tuple[int, int]]
    digest: bytes
    bytes_read: int


@dataclass(frozen=True, slots=True)
class _Record:
    """An entry by the central directory."""

    name: bytes
    flags: int
    size_bytes: int
    offset: int


class _Source:
    """Reads from a file, and remembers what was read."""

    def __init__(self, file: ScatteredBytes) -> None:
        self.file = file
        self.digest = xxhash.xxh3_128()
        self.bytes_read = 0

    def read(self, offset: int, count: int) -> bytes:
        data = self.file.read(offset, count)
        self.digest.update(data)
        self.bytes_read += count
        return data


def is_zip(beginning: bytes) -> bool:
    """Whether a file that begins so is a zip file with entries."""
    return beginning.startswith(_LOCAL_SIGNATURE)


def read_zip_directory(file: ScatteredBytes) -> ZipDirectory:
    """Read and check a zip file's directory and the header of every entry.

    Raises BrokenFileError; what reading raises passes through.
    """
    source = _Source(file)
    end_bytes = min(END_BYTES, file.size_bytes)
    file.announce([(file.size_bytes - end_bytes, end_bytes)])
    count, start, stop = _find_directory(source, file.size_bytes)
    records = _parse_directory(source.read(start, stop - start), count)
    file.announce(sorted((each.offset, _LOCAL.size + len(each.name)) for each in records))
    entries: dict[str, tuple[int, int]] = {}
    previous, free_from = "", 0
    for record in sorted(records, key=lambda record: record.offset):
        name = _checked_name(record.name)
        if name in entries:
            raise BrokenFileError(f"holds the entry {quoted(name)} twice.")
        if not entries and record.offset != 0:
            raise BrokenFileError(f"holds {record.offset:,} bytes before its first entry.")
        if record.offset < free_from:
            raise BrokenFileError(f"its entry {quoted(name)} overlaps {quoted(previous)}.")
        begin = _content_start(source, record, name, start)
        free_from = begin + record.size_bytes
        if free_from > start:
            raise BrokenFileError(f"its entry {quoted(name)} reaches into the directory.")
        entries[name] = (begin, free_from)
        previous = name
    return ZipDirectory(entries, source.digest.digest(), source.bytes_read)


def _find_directory(source: _Source, size_bytes: int) -> tuple[int, int, int]:
    """Number of entries, and byte range of the central directory."""
    if size_bytes < _END.size:
        raise BrokenFileError(f"holds {size_bytes} bytes, too few for a zip file.", INCOMPLETE)
    end = size_bytes - _END.size
    signature, disk, first_disk, here, count, length, start, comment = _END.unpack(
        source.read(end, _END.size)
    )
    if signature != _END_SIGNATURE:
        raise BrokenFileError(
            "does not end as a zip file does: its end is missing, or something follows it.",
            INCOMPLETE,
        )
    if comment or disk or first_disk or here != count:
        raise BrokenFileError("is part of a zip file, or has a comment; no torch file is or has.")
    found = _find_zip64(source, end)
    if found is not None:
        end, count64, length64, start64 = found
        for short, whole, marker in (
            (count, count64, _IN_ZIP64_SHORT),
            (length, length64, _IN_ZIP64),
            (start, start64, _IN_ZIP64),
        ):
            if short not in (whole, marker):
                raise BrokenFileError("has two ends that disagree on where its entries are.")
        count, length, start = count64, length64, start64
    if start + length != end:
        raise BrokenFileError(
            f"its directory of entries ({length:,} bytes from byte {start:,}) does not end where "
            f"the end of the file begins (byte {end:,}).",
            INCOMPLETE,
        )
    if length > DIRECTORY_LIMIT_BYTES or count > ENTRY_LIMIT:
        raise BrokenFileError(
            f"has a directory of {length:,} bytes for {count:,} entries; at most "
            f"{DIRECTORY_LIMIT_BYTES:,} bytes and {ENTRY_LIMIT:,} entries are read.",
            "Spread the tensors over several files, if they are a model's.",
        )
    return count, start, end


def _find_zip64(source: _Source, end: int) -> tuple[int, int, int, int] | None:
    """Where the zip64 end begins, number of entries, length and start of the directory."""
    locator_at = end - _END64_LOCATOR.size
    record_at = locator_at - _END64.size
    if locator_at < 0:
        return None
    signature, disk, offset, disks = _END64_LOCATOR.unpack(
        source.read(locator_at, _END64_LOCATOR.size)
    )
    if signature != _END64_LOCATOR_SIGNATURE:
        return None
    if record_at < 0 or offset != record_at or disk or disks != 1:
        raise BrokenFileError("has a zip64 end that is not where it must be.")
    signature, length, _, _, disk, first_disk, here, count, size_bytes, start = _END64.unpack(
        source.read(record_at, _END64.size)
    )
    if signature != _END64_SIGNATURE or length != _END64.size - 12:
        raise BrokenFileError("has a zip64 end that is not one.")
    if disk or first_disk or here != count:
        raise BrokenFileError("is part of a zip file; no torch file is.")
    return record_at, count, size_bytes, start


def _parse_directory(directory: bytes, count: int) -> list[_Record]:
    records = []
    position = 0
    for number in range(count):
        if position + _CENTRAL.size > len(directory):
            raise BrokenFileError(f"its directory of {count:,} entries ends at entry {number:,}.")
        fields = _CENTRAL.unpack_from(directory, position)
        signature, needed, flags, method = fields[0], *fields[2:5]
        packed, size_bytes, name_bytes, extra_bytes, comment_bytes = fields[8:13]
        disk, offset = fields[13], fields[16]
        position += _CENTRAL.size
        name = directory[position : position + name_bytes]
        position += name_bytes
        extra = directory[position : position + extra_bytes]
        position += extra_bytes + comment_bytes
        if signature != _CENTRAL_SIGNATURE or position > len(directory):
            raise BrokenFileError(f"entry {number:,} of its directory is not one.")
        shown = quoted(name.decode("utf-8", "replace"))
        size_bytes, packed, offset = _whole_numbers(extra, [size_bytes, packed, offset], shown)
        if method or packed != size_bytes:
            raise BrokenFileError(
                f"its entry {shown} is compressed; torch.save stores entries as they are "
                "(TorchScript programs, which are not taken, are compressed in part).",
                "Save the state dict with torch.save again.",
            )
        if needed > _VERSION_OF_ZIP64:
            raise BrokenFileError(
                f"its entry {shown} needs version {needed} of the zip format; torch writes up to "
                f"{_VERSION_OF_ZIP64}."
            )
        if disk or flags & ~(_SIZES_FOLLOW | _NAME_IS_UTF8):
            raise BrokenFileError(f"its entry {shown} is encrypted, or part of another file.")
        records.append(_Record(name, flags, size_bytes, offset))
    if position != len(directory):
        raise BrokenFileError(
            f"its directory holds {len(directory) - position:,} bytes after its {count:,} entries."
        )
    return records


def _whole_numbers(extra: bytes, numbers: list[int], name: str) -> list[int]:
    """The numbers, those that did not fit taken from the zip64 field, where they have that order.

    extra: an entry's fields, each with its kind and length.
    """
    needed = numbers.count(_IN_ZIP64)
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if length > len(extra) - position:
            raise BrokenFileError(f"its entry {name} has a field that is cut.")
        if kind == _ZIP64_EXTRA and 0 < 8 * needed <= length:
            whole = iter(struct.unpack_from(f"<{needed}Q", extra, position))
            numbers = [next(whole) if n == _IN_ZIP64 else n for n in numbers]
            needed = 0
        position += length
    if needed:
        raise BrokenFileError(f"its entry {name} has no size or place.")
    return numbers


def _content_start(source: _Source, record: _Record, name: str, limit: int) -> int:
    """Where an entry's content begins: behind its local header, which is checked.

    limit: where the central directory begins.
    """
    length = _LOCAL.size + len(record.name)
    if record.offset + length > limit:
        raise BrokenFileError(f"its entry {quoted(name)} lies beyond the entries.", INCOMPLETE)
    header = source.read(record.offset, length)
    fields = _LOCAL.unpack_from(header)
    signature, flags, method = fields[0], fields[2], fields[3]
    packed, size_bytes, name_bytes, extra_bytes = fields[7:]
    known = {record.size_bytes, _IN_ZIP64} | ({0} if record.flags & _SIZES_FOLLOW else set())
    if (
        signature != _LOCAL_SIGNATURE
        or (flags, method, name_bytes) != (record.flags, 0, len(record.name))
        or header[_LOCAL.size :] != record.name
        or not known >= {packed, size_bytes}
    ):
        raise BrokenFileError(
            f"the header of its entry {quoted(name)} is not what the directory says.", DAMAGED
        )
    return record.offset + length + int(extra_bytes)


def _checked_name(name: bytes) -> str:
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise BrokenFileError(f"holds an entry whose name {name[:80]!r} is not UTF-8.") from None
    if text.startswith("/") or "\\" in text or "\0" in text or ".." in text.split("/"):
        raise BrokenFileError(
            f"holds an entry {quoted(text)}, named like a path out of a folder.",
            "Do not use this model unless you know why.",
        )
    return text
