"""Telling the kernel what will be read, so that the disk works while the processors do.

The schedule is known: tensor after tensor, span after span. Whenever a worker begins a span, what
lies within AHEAD_BYTES behind it is announced (posix_fadvise, WILLNEED), once. What is in the page
cache already is not announced: asking for its last byte without waiting (preadv2, RWF_NOWAIT)
costs a microsecond, announcing 8 MB of cached pages 50.

Only announcements depend on this, no byte of the output.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Read
from .blocks import DeviceClass, elements_per_block
from .inputs import InputFiles
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
        self._reads = [_reads_of(graph, task) for task in tasks]
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
        here = self._first_byte[task] + sum(
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
            longest = max((read.element_count for read in reads), default=0)
            for start in range(0, longest, span):
                for read in reads:
                    item_bytes = DTYPES[read.dtype].item_bytes
                    length = min(span, read.element_count - start) * item_bytes
                    if length > 0:
                        path = f"{read.folder}/{read.tensor.file}"  # as inputs.py names it
                        yield path, read.tensor.start + start * item_bytes, length


def _reads_of(graph: Graph, task: TensorTask) -> tuple[Read, ...]:
    """The inputs of a tensor, each once, those of its first stage first."""
    reads = [read for stage in task.stages for read in graph.reads_of(stage.id)]
    return tuple({read.id: read for read in reads}.values())


def _is_cached(descriptor: int, byte: int) -> bool:
    no_wait = getattr(os, "RWF_NOWAIT", None)
    if no_wait is None:
        return False
    try:
        return os.preadv(descriptor, [bytearray(1)], byte, no_wait) == 1
    except OSError:  # it would have to wait; or the filesystem does not know the flag
        return False
