"""The checksum of a tensor, from the file that holds it, and of a whole file."""

from __future__ import annotations

import os
from pathlib import Path

from xxhash import xxh3_128, xxh3_128_hexdigest

READ_BYTES = 1 << 18
"""Read at a time: 1 GiB took 0.06 s from the page cache with 2^18 to 2^22, 0.07 s with 2^16."""


def tensor_checksum(descriptor: int, start: int, stop: int, span_bytes: int) -> str | None:
    """The checksum of a byte range, as the manifest defines it (manifest.CHECKSUM).

    span_bytes: length of the tensor's spans.

    Returns None if the file ends before the range does.

    Raises:
        OSError: it cannot be read.
    """
    buffer = memoryview(bytearray(READ_BYTES))
    digests = []
    while start < stop:
        span = xxh3_128()
        end = min(start + span_bytes, stop)
        while start < end:
            count = os.preadv(descriptor, [buffer[: end - start]], start)
            if not count:
                return None
            span.update(buffer[:count])
            start += count
        digests.append(span.digest())
    return xxh3_128_hexdigest(b"".join(digests))


def file_checksum(path: Path) -> str:
    """The xxh3_128 of a whole file.

    Raises:
        OSError: it cannot be read.
    """
    content = xxh3_128()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            content.update(buffer[:count])
    return content.hexdigest()
