"""Files that are read here and there: of torch's, the end, then the directory, then a few bytes
before every entry.

    LocalBytes      by pread
    FetchedBytes    by requests: the end at once, and what is announced by several at a time,
                    neighbours together
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Protocol

from .broken_file import INCOMPLETE, BrokenFileError

MOST_GAP_BYTES = 1 << 14
"""Bytes that nobody wants are fetched rather than asking twice: the norms of a layer with 8,192
numbers in 16 bits. At 100 MB/s that takes 0.2 ms."""

MOST_REQUEST_BYTES = 1 << 20
"""Of several places together."""

REQUESTS_AT_ONCE = 16
"""For the headers of a model's entries: one request for each large tensor of a torch file, and
hardly a byte comes with it. 13B models have 300: a second with answers after 50 ms."""

Place = tuple[int, int]
"""Offset in bytes from the start of the file, and number of bytes."""


class ScatteredBytes(Protocol):
    """A file that is read here and there."""

    @property
    def size_bytes(self) -> int:
        """Of all of it."""

    def read(self, offset: int, count: int) -> bytes:
        """So many bytes.

        Raises BrokenFileError where the file ends before.
        """

    def announce(self, places: Sequence[Place]) -> None:
        """Says what will be read soon, in ascending order."""


class LocalBytes:
    """A file of the local disk. descriptor: open for reading."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor = descriptor
        self.size_bytes = size_bytes

    def read(self, offset: int, count: int) -> bytes:
        data = os.pread(self._descriptor, count, offset)
        if len(data) != count:
            raise _ends_before(offset + count)
        return data

    def announce(self, places: Sequence[Place]) -> None:
        """The disk needs no telling."""


class FetchedBytes:
    """A file that lies elsewhere. What has been fetched of it is kept as long as this object is."""

    def __init__(
        self,
        first: bytes,
        size_bytes: int,
        fetch: Callable[[int, int], bytes],
        executor: Executor,
    ) -> None:
        """first: its first bytes. fetch: gives the bytes between two offsets; what it raises passes
        through. executor: runs several requests at a time."""
        self.size_bytes = size_bytes
        self._fetch = fetch
        self._executor = executor
        self._starts: list[int] = []
        self._pieces: list[bytes] = []
        self._keep(0, first)

    def read(self, offset: int, count: int) -> bytes:
        if offset + count > self.size_bytes:
            raise _ends_before(offset + count)
        found = self._kept(offset, count)
        if found is None:
            found = self._fetch(offset, offset + count)
            self._keep(offset, found)
        return found

    def announce(self, places: Sequence[Place]) -> None:
        missing = [
            (offset, count)
            for offset, count in places
            if offset + count <= self.size_bytes and self._kept(offset, count) is None
        ]
        groups = list(_joined(missing))
        for group, data in zip(groups, self._executor.map(self._fetch_group, groups), strict=True):
            for (offset, _), piece in zip(group, data, strict=True):
                self._keep(offset, piece)

    def _fetch_group(self, group: Sequence[Place]) -> list[bytes]:
        """The bytes of places that lie close together; nothing is kept of what lies between."""
        start, stop = group[0][0], max(offset + count for offset, count in group)
        data = self._fetch(start, stop)
        return [data[offset - start : offset - start + count] for offset, count in group]

    def _keep(self, start: int, data: bytes) -> None:
        place = bisect_right(self._starts, start)
        self._starts.insert(place, start)
        self._pieces.insert(place, data)

    def _kept(self, offset: int, count: int) -> bytes | None:
        """Bytes that one of the pieces holds; None if none does."""
        place = bisect_right(self._starts, offset) - 1
        if place < 0:
            return None
        begin = offset - self._starts[place]
        piece = self._pieces[place]
        return piece[begin : begin + count] if begin + count <= len(piece) else None


def _joined(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Places that lie close together, for one request each."""
    group: list[Place] = []
    for offset, count in places:
        if group:
            is_far = offset - sum(group[-1]) > MOST_GAP_BYTES
            if is_far or offset + count - group[0][0] > MOST_REQUEST_BYTES:
                yield group
                group = []
        group.append((offset, count))
    if group:
        yield group


def _ends_before(stop: int) -> BrokenFileError:
    return BrokenFileError(f"ends before byte {stop:,}.", INCOMPLETE)
