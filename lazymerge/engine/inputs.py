"""Reading byte ranges of input files, mapped or by pread.

`mmap` lets kernels decode straight from the page cache: every worker maps a window of a few blocks
of each input, one after the other. A fault maps what lies around it, up to 2 MiB of a large folio,
but never beyond the mapping, so what is resident is bounded to the page. `pread` copies into the
worker's arena first: one more copy within the cache, no page tables, and a file that shrinks under
the run is always an error and never a bus error. Which one is faster depends on the system; both
give the same bytes. Measurements: docs/performance.md.

Rows that stand in another order than in the file are gathered into the arena by pread in both
modes, as many at a time as lie beside each other.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..checkpoint.remote_reference import is_url
from ..checkpoint.tensor import DTYPES
from ..errors import LazymergeError
from ..graph.node import Read
from .execution import ReadMode
from .native.bus_error import Watch

Pieces = Sequence[tuple[int, int]]
"""Element ranges (start, stop_exclusive) of one tensor that together make a block."""


class InputFiles:
    """The input files of a run, each opened at most once. Safe to share by threads."""

    def __init__(
        self,
        stamps: Mapping[str, tuple[int, int]] | None = None,
        fetched: Mapping[str, int] | None = None,
    ) -> None:
        """stamps: size and time of modification (nanoseconds) that files must have when they are
        opened, by path.

        fetched: descriptors of files that are not on the local disk, by path; they stay open.
        """
        self.fetched = fetched or {}
        self._descriptors: dict[tuple[str, bool], int] = {}
        self._stamps = stamps or {}
        self.watch: Watch | None = None
        """Is told of every file that is opened, while files may be mapped."""
        self._lock = threading.Lock()

    def descriptor(self, path: str, *, is_scattered: bool = False) -> int:
        """An open file descriptor, read-only.

        is_scattered: it is for reading here and there, so that the system need not read ahead. With
        rows of 16 KiB in random order, not cached, that was 0.9 s per GB and not 2.3.
        """
        if path in self.fetched:
            return self.fetched[path]
        if is_url(path):
            raise LazymergeError(
                f"{path} is not on the local disk, and has not been fetched: a defect of "
                "lazymerge; download the model"
            )
        key = (path, is_scattered)
        with self._lock:
            if key not in self._descriptors:
                try:
                    self._descriptors[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    status = os.fstat(self._descriptors[key])
                except OSError as error:
                    raise LazymergeError(f"cannot open {path}: {error.strerror}") from error
                stamp = (status.st_size, status.st_mtime_ns)
                if self._stamps.get(path, stamp) != stamp:
                    raise changed_error(path)
                if self.watch is not None:
                    self.watch(self._descriptors[key], path)
                if is_scattered and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._descriptors[key], 0, 0, os.POSIX_FADV_RANDOM)
            return self._descriptors[key]

    def check(self) -> None:
        """Checks that no file was written to since it was opened. On a cluster nobody else can: the
        models may lie on every machine's own disk.

        Raises:
            LazymergeError: one was.
        """
        for (path, _), descriptor in list(self._descriptors.items()):
            try:
                status = os.fstat(descriptor)
            except OSError as error:
                raise LazymergeError(f"cannot read {path}: {error.strerror}") from error
            stamp = (status.st_size, status.st_mtime_ns)
            if self._stamps.get(path, stamp) != stamp:
                raise changed_error(path)

    def close(self) -> None:
        """Closes all files."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            os.close(descriptor)


class ChangedInputError(LazymergeError):
    """An input was written to while it was merged."""


def changed_error(path: str) -> ChangedInputError:
    """What to raise for an input that is not what it was when its merge went on."""
    return ChangedInputError(
        f"{path} was changed while it was merged (its size or time of modification is not what it "
        "was): what has been read of it may be of both. Begin anew with --overwrite, or put the "
        "file back as it was"
    )


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


SCATTERED_RUN = 8
"""Rows whose runs are shorter than this on average lie here and there."""


class GatheredInput:
    """Rows of a tensor in another order, gathered block by block into the worker's arena.

    A block may begin and end within a row.
    """

    def __init__(self, node: Read, files: InputFiles, slots: Sequence[memoryview]) -> None:
        """slots: room for a block each."""
        import numpy

        assert node.rows is not None
        self.path = f"{node.folder}/{node.tensor.file}"
        self._first_byte = node.tensor.start
        self._item_bytes = DTYPES[node.dtype].item_bytes
        self._row_elements = node.row_elements
        self._rows = numpy.frombuffer(node.rows.data, "<i4")
        apart = numpy.count_nonzero(numpy.diff(self._rows) != 1)
        is_scattered = bool(apart * SCATTERED_RUN > len(self._rows))
        self._descriptor = files.descriptor(self.path, is_scattered=is_scattered)
        self._slots = slots
        self._pieces: Pieces = ()
        self._gathered: tuple[int, int] = (0, 0)

    def seek(self, pieces: Pieces) -> None:
        """Moves to a block made of these pieces."""
        self._pieces = pieces

    def raw(self, slot: int = 0) -> memoryview:
        """The block's bytes, in the slot; what the slot held before is gone."""
        memory = self._slots[slot]
        filled = 0
        for start, stop in self._pieces:
            length = (stop - start) * self._item_bytes
            self._gather(start, stop, memory[filled : filled + length])
            filled += length
        return memory[:filled]

    def cover(self, start: int, stop: int) -> None:
        """Gathers an element range into the first slot."""
        self._gathered = (start, stop)
        self._gather(start, stop, self._slots[0][: (stop - start) * self._item_bytes])

    def room(self, address: int) -> int:
        """Where element 0 would lie if all elements lay like those that are gathered.

        address: of the first slot.
        """
        return address - self._gathered[0] * self._item_bytes

    def _gather(self, start: int, stop: int, memory: memoryview) -> None:
        """Fills memory with the elements of a range."""
        row_elements, item_bytes = self._row_elements, self._item_bytes
        row_bytes = row_elements * item_bytes
        first, last = start // row_elements, (stop - 1) // row_elements
        before = start * item_bytes - first * row_bytes
        for place, row, count in self._runs(first, last + 1):
            begin = max(0, place * row_bytes - before)
            end = min(len(memory), (place + count) * row_bytes - before)
            if row < 0:
                memory[begin:end] = bytes(end - begin)
                continue
            skipped = begin + before - place * row_bytes
            offset = self._first_byte + row * row_bytes + skipped
            read_exactly(self._descriptor, memory[begin:end], offset, self.path)

    def _runs(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Of some rows of the result, the runs that lie beside each other in the file: place among
        these rows, row in the file (-1: zeros), number of rows."""
        import numpy

        rows = self._rows[first:stop]
        steps = numpy.diff(rows)
        together = numpy.where(rows[1:] < 0, steps == 0, (steps == 1) & (rows[:-1] >= 0))
        begins = [0, *(numpy.flatnonzero(~together) + 1).tolist()]
        for begin, end in zip(begins, [*begins[1:], len(rows)], strict=True):
            yield begin, int(rows[begin]), end - begin

    def read_into(self, out: Any) -> None:
        """Decoding is what frames do."""
        raise TypeError("undecoded bytes")

    def release(self) -> None:
        """Nothing to release: the arena is reused."""

    def forget(self, start: int, stop: int) -> None:
        """Nothing is let out of the page cache: neighbouring rows may be wanted later."""


Input = PreadInput | MappedInput | GatheredInput


def open_input(
    node: Read,
    files: InputFiles,
    read_mode: ReadMode,
    slots: Sequence[memoryview],
    window_elements: int,
) -> Input:
    """An input tensor in the given mode.

    slots: room for a block each. window_elements: what is mapped of it at a time.
    """
    if node.rows is not None:
        return GatheredInput(node, files, slots)
    if read_mode == "mmap":
        return MappedInput(node, files, slots, window_elements)
    return PreadInput(node, files, slots)
