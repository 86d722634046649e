"""Telling the kernel what will be read, so that the disk works while the processors do.

The schedule is known: tensor after tensor, span after span. Whenever a worker begins a span, what
lies within AHEAD_BYTES behind it is announced (posix_fadvise, WILLNEED), once. What is in the page
cache already is not announced: asking for its last byte without waiting (preadv2, RWF_NOWAIT)
costs a microsecond, announcing 8 MB of cached pages 50.

Only announcements depend on this, no byte of the output.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, cast

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Read
from .blocks import DeviceClass, elements_per_block
from .inputs import InputFiles
from .needed_ranges import path_of
from .scheduler import SPAN_BLOCKS
from .stages import TensorTask

AHEAD_BYTES = 128 << 20
"""How far to read ahead of the span that is begun: a tenth of a second of a fast disk. Page cache,
which the system takes back when it needs it."""


class ReadAhead:
    """Announces the inputs of a run in the order in which it will read them."""

    def __init__(
        self, graph: Graph, tasks: Sequence[TensorTask], files: InputFiles, device: DeviceClass
    ) -> None:
        self._files = files
        self._reads = [_reads_of(graph, task, files) for task in tasks]
        self._first_byte = [0]
        for reads in self._reads:
            size = sum(read.tensor.size_bytes for read in reads)
            self._first_byte.append(self._first_byte[-1] + size)
        self._block_elements = elements_per_block(device)
        self._ranges = self._all_ranges()
        self._announced = 0
        self._lock = threading.Lock()
        self._is_wanted = hasattr(os, "posix_fadvise")

    def reached(self, task: int, start: int) -> None:
        """Says that a worker begins to read a tensor's inputs at an element."""
        if not self._is_wanted:
            return
        here = self._first_byte[task]
        if start:
            here += sum(
                min(start, read.element_count) * DTYPES[read.dtype].item_bytes
                for read in self._reads[task]
            )
        while True:
            with self._lock:
                if self._announced > here + AHEAD_BYTES:
                    return
                following = next(self._ranges, None)
                if following is None:
                    self._is_wanted = False
                    return
                path, first, length = following
                self._announced += length
            descriptor = self._files.descriptor(path)
            if not _is_cached(descriptor, first + length - 1):
                os.posix_fadvise(descriptor, first, length, os.POSIX_FADV_WILLNEED)

    def _all_ranges(self) -> Iterator[tuple[str, int, int]]:
        """Path, first byte and length, a span of every input at a time."""
        span = SPAN_BLOCKS * self._block_elements
        for reads in self._reads:
            inputs = [
                # the path as inputs.py names it
                (f"{read.folder}/{read.tensor.file}", read.tensor.start, count, item_bytes)
                for read in reads
                for count, item_bytes in [(read.element_count, DTYPES[read.dtype].item_bytes)]
            ]
            for start in range(0, max((count for _, _, count, _ in inputs), default=0), span):
                for path, first, count, item_bytes in inputs:
                    length = min(span, count - start) * item_bytes
                    if length > 0:
                        yield path, first + start * item_bytes, length


def _reads_of(graph: Graph, task: TensorTask, files: InputFiles) -> tuple[Read, ...]:
    """The inputs of a tensor, each once, those of its first stage first; without those whose rows
    are read in another order, and those that are not on the local disk."""
    reads = [
        read
        for stage in task.stages
        for read in graph.reads_of(stage.id)
        if read.rows is None and path_of(read) not in files.fetched
    ]
    return tuple({read.id: read for read in reads}.values())


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


_BYTE = ctypes.create_string_buffer(1)
_ROOM = _Vector(ctypes.addressof(_BYTE), 1)
"""Where bytes go that nobody looks at."""


@cache
def _preadv2() -> Callable[[int, Any, int, int, int], int]:
    """The system's call, made without letting go of the interpreter lock: it does not wait, and
    with os.preadv getting the lock back takes longer than the call (the loop of 32 simulated
    workers: 63 ms, 49 ms in this way)."""
    call = ctypes.PyDLL(None).preadv2
    call.argtypes = [*(ctypes.c_int, ctypes.c_void_p, ctypes.c_int), ctypes.c_int64, ctypes.c_int]
    call.restype = ctypes.c_ssize_t
    return cast("Callable[[int, Any, int, int, int], int]", call)


def _is_cached(descriptor: int, byte: int) -> bool:
    no_wait = getattr(os, "RWF_NOWAIT", None)  # where it is, the system's library has the call
    if no_wait is None:
        return False
    # -1: it would have to wait; or the filesystem does not know the flag
    return _preadv2()(descriptor, ctypes.byref(_ROOM), 1, byte, no_wait) == 1
