"""Which chunks of inputs that lie elsewhere jobs and tasks read, and how much of each."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Read
from .memory_files import pages
from .needed_ranges import chunks_of, last_stage, path_of, reads_of_task, rows_between
from .scheduler import Job
from .stages import TensorTask

Key = tuple[str, int]
"""A chunk: path of its file, number."""

HELD = 1 << 62
"""Bytes: in place of a number that can be reached."""


@dataclass(slots=True)
class Place:
    """A chunk's part in a task.

    position: where it is in its tensor, 0 to 1. wanted: bytes that the last pass reads of it; HELD:
    it is wanted until the task is finished.
    """

    position: float
    wanted: int = 0


class WantedChunks:
    """What the tasks of a run want of the files that lie elsewhere.

    layouts: of all chunks, by path.
    """

    def __init__(
        self, graph: Graph, tasks: Sequence[TensorTask], paths: Container[str], gap_bytes: int
    ) -> None:
        """paths: of the files. gap_bytes: as of chunks_of."""
        self._graph = graph
        self._tasks = tasks
        self._paths = paths
        self._places: dict[int, dict[Key, Place]] = {}
        reads = {read.id: read for task in tasks for read in self._remote_reads(task)}
        self.layouts = chunks_of(reads.values(), gap_bytes)

    def forget(self, index: int) -> Iterable[Key]:
        """A task is finished; the chunks that it wanted, as far as it was begun."""
        return self._places.pop(index, {}).keys()

    def _remote_reads(self, task: TensorTask) -> list[Read]:
        return [read for read in reads_of_task(self._graph, task) if path_of(read) in self._paths]

    def size(self, key: Key) -> int:
        """Memory that a chunk takes, whole pages."""
        layout, number = self.layouts[key[0]], key[1]
        return pages(layout.starts[number], layout.stops[number])[1]

    def of_job(self, job: Job) -> dict[Key, int]:
        """The chunks that a job reads from, and how many bytes of each."""
        stage = job.task.stages[job.stage]
        keys: dict[Key, int] = {}
        for read in self._graph.reads_of(stage.id):
            if path_of(read) not in self._paths:
                continue
            pieces = joined([piece for block in job.pieces for piece in block])
            if read.rows is not None:
                pieces = _rows_of(read, pieces)
            elif read.element_count != stage.element_count:
                pieces = [(0, read.element_count)]
            for start, stop in pieces:
                self._add(keys, read, start, stop)
        return keys

    def _add(self, keys: dict[Key, int], read: Read, start: int, stop: int) -> None:
        """start, stop: elements."""
        path, item_bytes = path_of(read), DTYPES[read.dtype].item_bytes
        first = read.tensor.start + start * item_bytes
        last = read.tensor.start + stop * item_bytes
        layout = self.layouts.get(path)
        if layout is None:  # nothing but empty tensors
            return
        for number in layout.overlapping(first, last):
            within = min(last, layout.stops[number]) - max(first, layout.starts[number])
            keys[path, number] = keys.get((path, number), 0) + within

    def of_task(self, index: int) -> dict[Key, Place]:
        """All chunks of a task, in the order in which it comes to them."""
        if index in self._places:
            return self._places[index]
        task = self._tasks[index]
        last = last_stage(task)
        streamed = {
            read.id
            for read in self._graph.reads_of(last.id)
            if read.rows is None and read.element_count == last.element_count
        }
        found: dict[Key, Place] = {}
        for read in self._remote_reads(task):
            keys: dict[Key, int] = {}
            self._add(keys, read, 0, read.tensor.element_count)
            for (path, number), size in keys.items():
                begins = self.layouts[path].starts[number] - read.tensor.start
                position = max(0.0, begins / read.tensor.size_bytes)
                place = found.setdefault((path, number), Place(position))
                place.position = min(place.position, position)
                place.wanted = place.wanted + size if read.id in streamed else HELD
                place.wanted = min(place.wanted, HELD)
        self._places[index] = dict(sorted(found.items(), key=lambda pair: pair[1].position))
        return self._places[index]


def joined(pieces: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Element ranges, those that follow one another as one."""
    ranges: list[tuple[int, int]] = []
    for start, stop in pieces:
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return ranges


def _rows_of(read: Read, pieces: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where in the file the elements of an input in another order are, as element ranges of the
    tensor."""
    import numpy

    found: list[tuple[int, int]] = []
    for start, stop in pieces:
        rows = rows_between(read, start, stop)
        if len(rows):
            ends = numpy.flatnonzero(numpy.diff(rows) != 1) + 1
            for run in numpy.split(rows, ends):
                first, last = int(run[0]), int(run[-1]) + 1
                found.append((first * read.row_elements, last * read.row_elements))
    return found
