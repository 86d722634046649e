"""Reading byte ranges of input files, mapped or by pread.

`mapped` lets kernels decode straight from the page cache; pages are released when a span of
blocks is done. `pread` copies into the worker's arena first: one more copy within the cache, no
page faults, and a file that shrinks under the run is an error instead of a bus error. Which one
is faster depends on the system; both give the same bytes. Measurements: docs/performance.md.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from typing import Any

from ..checkpoint.tensor import DTYPES
from ..errors import LazymergeError
from ..graph.node import Read
from .execution import ReadMode

FOLIO_BYTES = 2 << 20
"""The most that one page fault maps: a large folio of the page cache, aligned to its size. Pages
before a span's start that came with its first fault would otherwise stay for good: ties of 1.1B
models held 34 MiB more."""

Pieces = Sequence[tuple[int, int]]
"""Element ranges (start, stop_exclusive) of one tensor that together make a block."""


class InputFiles:
    """The input files of a run, each opened and mapped at most once. Safe to share by threads."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: str) -> int:
        """An open file descriptor, read-only."""
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise LazymergeError(f"cannot open {path}: {error.strerror}") from error
            return self._descriptors[path]

    def mapping(self, path: str) -> mmap.mmap:
        """The whole file, mapped copy-on-write and never written to: torch insists on writable
        buffers, and this way nothing can reach the file."""
        descriptor = self.descriptor(path)
        with self._lock:
            if path not in self._maps:
                self._maps[path] = mmap.mmap(
                    descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
            return self._maps[path]

    def close(self) -> None:
        """Closes all files. Maps that tensors still refer to go with those tensors."""
        self._maps.clear()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def read_exactly(descriptor: int, buffer: memoryview, offset: int, path: str) -> None:
    """Fills the buffer from a file.

    buffer: writable, any length.
    offset: bytes from the start of the file.

    Raises:
        LazymergeError: the file is shorter than it was, or cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise LazymergeError(
                f"reading {path} at byte {offset + done}: {error.strerror}"
            ) from error
        if count == 0:
            raise LazymergeError(
                f"{path} ends at byte {offset + done}, though its header promises more; "
                "it was changed or truncated while it was being read"
            )
        done += count


class PreadInput:
    """One input tensor, copied block by block into the worker's arena."""

    def __init__(self, node: Read, files: InputFiles, slots: Sequence[memoryview]) -> None:
        """slots: room for a block each."""
        self.path = f"{node.folder}/{node.tensor.file}"
        self.descriptor = files.descriptor(self.path)
        self._first_byte = node.tensor.start
        self._item_bytes = DTYPES[node.dtype].item_bytes
        self._slots = slots
        self._pieces: Pieces = ()

    def seek(self, pieces: Pieces) -> None:
        """Moves to a block made of these pieces."""
        self._pieces = pieces

    def raw(self, slot: int = 0) -> memoryview:
        """The block's bytes, in the slot; what the slot held before is gone."""
        memory = self._slots[slot]
        item_bytes = self._item_bytes
        filled = 0
        for start, stop in self._pieces:
            length = (stop - start) * item_bytes
            read_exactly(
                self.descriptor,
                memory[filled : filled + length],
                self._first_byte + start * item_bytes,
                self.path,
            )
            filled += length
        return memory[:filled]

    def read_into(self, out: Any) -> None:
        """Decoding is what frames do."""
        raise TypeError("undecoded bytes")

    def release(self, start: int, stop: int) -> None:
        """Nothing to release: the arena is reused."""

    def forget(self, start: int, stop: int) -> None:
        """Lets an element range out of the system's page cache."""
        if hasattr(os, "posix_fadvise"):
            first = self._first_byte + start * self._item_bytes
            length = (stop - start) * self._item_bytes
            os.posix_fadvise(self.descriptor, first, length, os.POSIX_FADV_DONTNEED)


class MappedInput:
    """One input tensor, as it lies in the mapped file.

    A block of several pieces, a sample, is copied by pread all the same: touching pages here and
    there would map many around each (fault-around, large folios) all over the tensor.
    """

    def __init__(self, node: Read, files: InputFiles, slots: Sequence[memoryview] = ()) -> None:
        """slots: room for a block each, where samples are taken."""
        self.path = f"{node.folder}/{node.tensor.file}"
        self.map = files.mapping(self.path)
        self.tensor = node.tensor
        self.pieces: Pieces = ()
        self._item_bytes = DTYPES[node.dtype].item_bytes
        self._view = memoryview(self.map)
        self._copied = PreadInput(node, files, slots)
        if len(self.map) < node.tensor.stop_exclusive:
            raise LazymergeError(f"{self.path} is shorter than its header promises")

    def seek(self, pieces: Pieces) -> None:
        """Moves to a block made of these pieces."""
        self.pieces = pieces

    def byte_offset(self, element: int) -> int:
        """Where an element lies in the map."""
        return self.tensor.start + element * self._item_bytes

    def raw(self, slot: int = 0) -> memoryview:
        """The block's bytes, in the map; of a sample, in the slot."""
        if len(self.pieces) > 1:
            self._copied.seek(self.pieces)
            return self._copied.raw(slot)
        ((start, stop),) = self.pieces
        return self._view[self.byte_offset(start) : self.byte_offset(stop)]

    def read_into(self, out: Any) -> None:
        """Decoding is what frames do."""
        raise TypeError("undecoded bytes")

    def release(self, start: int, stop: int) -> None:
        """Gives the pages of an element range back, and those that faults have mapped around it.

        Pages that another worker is about to read are mapped again when it does.
        """
        first = self.byte_offset(start) // FOLIO_BYTES * FOLIO_BYTES
        last = min(len(self.map), -(-self.byte_offset(stop) // FOLIO_BYTES) * FOLIO_BYTES)
        if last > first:
            self.map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def forget(self, start: int, stop: int) -> None:
        """Lets an element range out of the system's page cache, once it is no longer mapped."""
        self._copied.forget(start, stop)


def open_input(
    node: Read, files: InputFiles, read_mode: ReadMode, slots: Sequence[memoryview]
) -> PreadInput | MappedInput:
    """An input tensor in the given mode. slots: room for a block each."""
    if read_mode == "mmap":
        return MappedInput(node, files, slots)
    return PreadInput(node, files, slots)
