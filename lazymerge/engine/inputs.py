"""Reading byte ranges of input files, mapped or by pread.

`mmap` lets kernels decode straight from the page cache: every worker maps a window of a few blocks
of each input, one after the other. A fault maps what lies around it, up to 2 MiB of a large folio,
but never beyond the mapping, so what is resident is bounded to the page. `pread` copies into the
worker's arena first: one more copy within the cache, no page tables, and a file that shrinks under
the run is always an error and never a bus error. Which one is faster depends on the system; both
give the same bytes. Measurements: docs/performance.md.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Any

from ..checkpoint.tensor import DTYPES
from ..errors import LazymergeError
from ..graph.node import Read
from .execution import ReadMode
from .native.bus_error import watch_for_bus_errors

Pieces = Sequence[tuple[int, int]]
"""Element ranges (start, stop_exclusive) of one tensor that together make a block."""


class InputFiles:
    """The input files of a run, each opened at most once. Safe to share by threads."""

    def __init__(self, read_mode: ReadMode = "pread") -> None:
        self._descriptors: dict[str, int] = {}
        self._is_mapped = read_mode == "mmap"
        self._lock = threading.Lock()

    def descriptor(self, path: str) -> int:
        """An open file descriptor, read-only."""
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise LazymergeError(f"cannot open {path}: {error.strerror}") from error
                if self._is_mapped:
                    watch_for_bus_errors(self._descriptors[path], path)
            return self._descriptors[path]

    def close(self) -> None:
        """Closes all files."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            os.close(descriptor)


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

    def release(self) -> None:
        """Nothing to release: the arena is reused."""

    def forget(self, start: int, stop: int) -> None:
        """Lets an element range out of the system's page cache."""
        if hasattr(os, "posix_fadvise"):
            first = self._first_byte + start * self._item_bytes
            length = (stop - start) * self._item_bytes
            os.posix_fadvise(self.descriptor, first, length, os.POSIX_FADV_DONTNEED)


class MappedInput:
    """One input tensor, a window of it mapped at a time.

    A block of several pieces, a sample, is copied by pread all the same: they lie all over the
    tensor.
    """

    def __init__(
        self,
        node: Read,
        files: InputFiles,
        slots: Sequence[memoryview] = (),
        window_elements: int = 0,
    ) -> None:
        """slots: room for a block each, where samples are taken.

        window_elements: what is mapped at a time, unless more is asked for at once.
        """
        self.path = f"{node.folder}/{node.tensor.file}"
        self.tensor = node.tensor
        self.window: mmap.mmap | None = None
        self._descriptor = files.descriptor(self.path)
        self._window_elements = window_elements
        self._window_start = self._window_stop = 0
        self._window_byte = 0
        self._pieces: Pieces = ()
        self._item_bytes = DTYPES[node.dtype].item_bytes
        self._copied = PreadInput(node, files, slots)

    def seek(self, pieces: Pieces) -> None:
        """Moves to a block made of these pieces."""
        self._pieces = pieces
        if len(pieces) == 1:
            self.cover(*pieces[0])

    def cover(self, start: int, stop: int) -> None:
        """Has an element range mapped, and nothing that lies before it.

        Raises:
            LazymergeError: the file is shorter than it was, or cannot be mapped or read.
        """
        if self._window_start <= start and stop <= self._window_stop:
            return
        self.release()
        stop = max(stop, min(start + self._window_elements, self.tensor.element_count))
        first = self._byte(start) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            # Private, so that nothing reaches the file: torch insists on writable buffers.
            self.window = mmap.mmap(
                self._descriptor,
                self._byte(stop) - first,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=first,
            )
        except (OSError, ValueError) as error:  # ValueError: the file ends before
            self.release()
            raise self._unreadable(error, self._byte(stop)) from error
        self._window_start, self._window_stop, self._window_byte = start, stop, first

    def _unreadable(self, error: Exception, end: int) -> LazymergeError:
        if os.fstat(self._descriptor).st_size < end:
            return LazymergeError(
                f"{self.path} is shorter than its header promises: it was changed or truncated "
                "while it was being read"
            )
        return LazymergeError(f"reading {self.path}, mapped: {error}")

    def _byte(self, element: int) -> int:
        return self.tensor.start + element * self._item_bytes

    def offset(self, element: int) -> int:
        """Where an element that is mapped lies in the window, in bytes."""
        return self._byte(element) - self._window_byte

    @property
    def address(self) -> int:
        """Where the file's first byte would lie in memory if it were all mapped like the window."""
        assert self.window is not None
        return ctypes.addressof(ctypes.c_char.from_buffer(self.window)) - self._window_byte

    def raw(self, slot: int = 0) -> memoryview:
        """The block's bytes, in the window; of a sample, in the slot."""
        if len(self._pieces) > 1:
            self._copied.seek(self._pieces)
            return self._copied.raw(slot)
        ((start, stop),) = self._pieces
        return memoryview(self.window)[self.offset(start) : self.offset(stop)]  # type: ignore[arg-type]

    def read_into(self, out: Any) -> None:
        """Decoding is what frames do."""
        raise TypeError("undecoded bytes")

    def release(self) -> None:
        """Gives the window back; its memory goes when nothing refers to it any more."""
        self.window = None
        self._window_start = self._window_stop = 0

    def forget(self, start: int, stop: int) -> None:
        """Lets an element range out of the system's page cache, once it is no longer mapped."""
        self._copied.forget(start, stop)


def open_input(
    node: Read,
    files: InputFiles,
    read_mode: ReadMode,
    slots: Sequence[memoryview],
    window_elements: int,
) -> PreadInput | MappedInput:
    """An input tensor in the given mode.

    slots: room for a block each. window_elements: what is mapped of it at a time.
    """
    if read_mode == "mmap":
        return MappedInput(node, files, slots, window_elements)
    return PreadInput(node, files, slots)
