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
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..checkpoint.tensor import DTYPES
from ..errors import LazymergeError
from ..graph.node import Read

if TYPE_CHECKING:
    from torch import Tensor

ReadMode = Literal["mmap", "pread"]

PAGE_BYTES = mmap.PAGESIZE

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

    def __init__(
        self,
        node: Read,
        files: InputFiles,
        raw: Sequence[tuple[Tensor, memoryview]],
    ) -> None:
        """raw: per slot, a uint8 tensor and the same memory as a memoryview."""
        import torch

        self._path = str(Path(node.folder) / node.tensor.file)
        self._descriptor = files.descriptor(self._path)
        self._first_byte = node.tensor.start
        dtype = DTYPES[node.dtype]
        self._item_bytes = dtype.item_bytes
        self._raw = raw
        whole = raw[0][0]
        usable = len(whole) // dtype.item_bytes * dtype.item_bytes
        self._typed = whole[:usable].view(getattr(torch, dtype.torch_name))
        self._pieces: Pieces = ()
        self._elements = 0

    def seek(self, pieces: Pieces, elements: int) -> None:
        """Moves to a block made of these pieces, of so many elements in all."""
        self._pieces = pieces
        self._elements = elements

    def _fill(self, slot: int) -> None:
        memory = self._raw[slot][1]
        item_bytes = self._item_bytes
        filled = 0
        for start, stop in self._pieces:
            length = (stop - start) * item_bytes
            read_exactly(
                self._descriptor,
                memory[filled : filled + length],
                self._first_byte + start * item_bytes,
                self._path,
            )
            filled += length

    def raw(self, slot: int = 0) -> Tensor:
        self._fill(slot)
        return self._raw[slot][0][: self._elements * self._item_bytes]

    def read_into(self, out: Tensor) -> None:
        self._fill(0)
        out.copy_(self._typed[: self._elements])

    def release(self, start: int, stop: int) -> None:
        """Nothing to release: the arena is reused."""


class MappedInput:
    """One input tensor, decoded straight from the mapped file."""

    def __init__(self, node: Read, files: InputFiles) -> None:
        import torch

        self._path = str(Path(node.folder) / node.tensor.file)
        self._map = files.mapping(self._path)
        info = node.tensor
        dtype = DTYPES[info.dtype]
        self._item_bytes = dtype.item_bytes
        self._first_byte = info.start
        if len(self._map) < info.stop_exclusive:
            raise LazymergeError(f"{self._path} is shorter than its header promises")
        self._typed = torch.frombuffer(
            self._map,
            dtype=getattr(torch, dtype.torch_name),
            count=info.element_count,
            offset=info.start,
        )
        self._bytes = torch.frombuffer(
            self._map, dtype=torch.uint8, count=info.size_bytes, offset=info.start
        )
        self._pieces: Pieces = ()

    def seek(self, pieces: Pieces, elements: int) -> None:
        """Moves to a block made of these pieces, of so many elements in all."""
        self._pieces = pieces

    def raw(self, slot: int = 0) -> Tensor:
        ((start, stop),) = self._pieces
        return self._bytes[start * self._item_bytes : stop * self._item_bytes]

    def read_into(self, out: Tensor) -> None:
        if len(self._pieces) == 1:
            start, stop = self._pieces[0]
            out.copy_(self._typed[start:stop])
            return
        filled = 0
        for start, stop in self._pieces:
            out[filled : filled + stop - start].copy_(self._typed[start:stop])
            filled += stop - start

    def release(self, start: int, stop: int) -> None:
        """Gives the pages of an element range back; whole pages within the range only."""
        first = self._first_byte + start * self._item_bytes
        last = self._first_byte + stop * self._item_bytes
        first = -(-first // PAGE_BYTES) * PAGE_BYTES
        last = last // PAGE_BYTES * PAGE_BYTES
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
