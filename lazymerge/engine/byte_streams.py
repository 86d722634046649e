"""Tensors read byte by byte, wherever they lie: for what looks at bits and merges nothing.

What lies on the local disk may be read at any time. What lies elsewhere is fetched ahead, span by
span, as for a merge (fetching.py): whoever reads a tensor goes from span to span, and may read one
until it asks for the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint.tensor import TensorInfo
from ..graph.graph import Graph
from ..graph.node import Apply, Read, Write
from ..graph.operations.identical import Identical
from .blocks import elements_per_block
from .fetching import Fetcher
from .inputs import InputFiles
from .needed_ranges import FetchNeeds, fetch_needs
from .remote_inputs import Distant
from .scheduler import SPAN_BLOCKS, Job
from .stages import TensorTask

Stamps = Mapping[str, tuple[int, int]]
Place = tuple[str, TensorInfo]
"""A folder, and a tensor in one of its files."""


@dataclass(frozen=True, slots=True)
class ByteReading:
    """What there is to read: tensors of one size at a time, side by side.

    tasks: one for each.
    """

    graph: Graph
    tasks: tuple[TensorTask, ...]

    def needs(self, remote: Mapping[str, Distant]) -> FetchNeeds:
        """What must be held of files that lie elsewhere. remote: those, by path."""
        return fetch_needs(self.graph, self.tasks, remote, "cpu")


def byte_reading(groups: Sequence[Sequence[Place]]) -> ByteReading:
    """Reading groups of tensors one after the other. groups: of each, tensors of equal bytes."""
    graph = Graph()
    tasks = []
    for group in groups:
        first = group[0][1]
        shape = (first.size_bytes,)
        reads = [
            graph.add(Read(folder, replace(tensor.stored, dtype="U8", shape=shape)))
            for folder, tensor in group
        ]
        source = reads[0]
        if len(reads) > 1:
            source = graph.add(Apply(Identical.name, (), tuple(reads), (), shape, "U8"))
        write = Write(first.name, "U8", shape, source)
        graph.add(write)
        tasks.append(TensorTask(write, ()))
    return ByteReading(graph, tuple(tasks))


class ByteStreams:
    """Reads tensors from the local disk and from elsewhere. Safe to use from several threads."""

    def __init__(
        self,
        reading: ByteReading,
        remote: Mapping[str, Distant],
        budget_bytes: int = 0,
        workers: int = 1,
        stamps: Stamps | None = None,
    ) -> None:
        """remote: files that lie elsewhere, by path.

        budget_bytes: what may be held of them. workers: that read at a time. stamps: as InputFiles.
        """
        self._tasks = reading.tasks
        self._stopped = False
        self._fetcher: Fetcher | None = None
        if remote:
            self._fetcher = Fetcher(
                reading.graph, reading.tasks, remote, budget_bytes, workers, lambda: self._stopped
            )
        fetched = None if self._fetcher is None else self._fetcher.descriptors
        self.files = InputFiles(stamps, fetched)

    def spans(self, number: int) -> Iterator[tuple[int, int]]:
        """The bytes of a group's tensors, from the first to the last: start and stop_exclusive of
        what can be read now, until the next is asked for.

        number: of the group.

        Raises:
            LazymergeError: they cannot be fetched. FetchingStopped: it has been stopped.
        """
        task = self._tasks[number]
        size = task.write.element_count
        if self._fetcher is None:
            yield from [(0, size)] * (size > 0)
            return
        span = SPAN_BLOCKS * elements_per_block("cpu")
        for start in range(0, size, span):
            stop = min(start + span, size)
            job = Job(number, task, 0, start, (((start, stop),),), None, {})
            self._fetcher.acquire(job)
            try:
                yield start, stop
            except GeneratorExit:  # the rest is not wanted
                self._fetcher.release(job)
                break
            self._fetcher.release(job)
        self._fetcher.finished(number)

    @property
    def held_bytes(self) -> int:
        """The most that was held at a time of files that lie elsewhere."""
        return 0 if self._fetcher is None else self._fetcher.most_held_bytes

    def stop(self) -> None:
        """Nobody waits for anything any more."""
        self._stopped = True

    def close(self) -> None:
        """Closes all files."""
        self.stop()
        self.files.close()
        if self._fetcher is not None:
            self._fetcher.close()
