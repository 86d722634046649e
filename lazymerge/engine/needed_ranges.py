"""Which bytes of files that lie elsewhere a merge reads, and in which pieces they are fetched.

The ranges of all tensors that are read are united, gaps of up to `max_gap_bytes` between them
with them, and cut at multiples of CHUNK_BYTES:

    file     ░░▓▓▓▓▓▓▓▓▓▓▓▓░░░░░░░░░▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓░
    chunks     ├───┼────┼──┤        ├─┼────┼────┼────┤

No byte is in two chunks, and no page of memory either, so that each can be let go of by itself.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoint.tensor import DTYPES
from ..errors import InputError
from ..graph.graph import Graph
from ..graph.node import Read, Reduce, Write
from ..graph.operation import reduce_operation
from .blocks import DeviceClass, elements_per_block
from .network import MAX_GAP_BYTES
from .scheduler import SPAN_BLOCKS
from .stages import TensorTask, row_elements

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

CHUNK_BYTES = 2 << 20
"""A quarter of a span of a bfloat16 input. What is fetched is let go of in such pieces; requests
are for many of them."""

MOST_CHUNKS = 1 << 22
"""Of a merge: 8 TiB, twice what three models of 671B take in 16 bits. They are listed in memory,
and a header of a hundred bytes may claim a tensor of exabytes."""

assert CHUNK_BYTES % mmap.ALLOCATIONGRANULARITY == 0


@dataclass(frozen=True, slots=True)
class FileChunks:
    """The chunks of one file, in the order of their bytes."""

    starts: Sequence[int]
    stops: Sequence[int]

    @property
    def size_bytes(self) -> int:
        return sum(self.stops) - sum(self.starts)

    @property
    def held_bytes(self) -> int:
        """Memory that all of them take, whole pages."""
        return self.size_bytes + 2 * mmap.PAGESIZE * self.runs

    def overlapping(self, start: int, stop: int) -> range:
        """Numbers of the chunks that hold a byte range."""
        first = bisect_right(self.stops, start)
        return range(first, bisect_right(self.starts, stop - 1) if stop > start else first)

    @property
    def runs(self) -> int:
        """How many ranges without a gap they make."""
        pairs = zip(self.stops, self.starts[1:], strict=False)
        return bool(self.starts) + sum(stop != start for stop, start in pairs)


def path_of(read: Read) -> str:
    """The file of an input, as inputs.py names it."""
    return f"{read.folder}/{read.tensor.file}"


def chunks_of(reads: Iterable[Read], max_gap_bytes: int = MAX_GAP_BYTES) -> dict[str, FileChunks]:
    """The chunks of every file that is read, by path.

    Raises:
        InputError: they are too many.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for read in reads:
        if read.tensor.size_bytes:
            place = (read.tensor.start, read.tensor.stop_exclusive)
            ranges.setdefault(path_of(read), []).append(place)
    joined = {path: united(sorted(set(each)), max_gap_bytes) for path, each in ranges.items()}
    sizes = {path: sum(stop - start for start, stop in each) for path, each in joined.items()}
    if sum(sizes.values()) > MOST_CHUNKS * CHUNK_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise InputError(
            f"{largest}: its header claims {sizes[largest]:,} bytes of tensors; at most "
            f"{MOST_CHUNKS * CHUNK_BYTES:,} are fetched for a merge. It is not what its name says, "
            "or download the models"
        )
    return {path: _cut(each) for path, each in joined.items()}


def united(ranges: Sequence[tuple[int, int]], max_gap_bytes: int) -> list[tuple[int, int]]:
    """Ranges, ascending, with those between which no more than a gap lies as one."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and start - found[-1][1] <= max_gap_bytes:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def _cut(ranges: Sequence[tuple[int, int]]) -> FileChunks:
    starts: list[int] = []
    stops: list[int] = []
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // CHUNK_BYTES + 1) * CHUNK_BYTES)
            starts.append(start)
            stops.append(end)
            start = end
    return FileChunks(starts, stops)


def reads_of_task(graph: Graph, task: TensorTask) -> tuple[Read, ...]:
    """All inputs of an output tensor, each once."""
    reads = {read.id: read for stage in task.stages for read in graph.reads_of(stage.id)}
    return tuple(reads.values())


def last_stage(task: TensorTask) -> Reduce | Write:
    """The stage whose pass over a task's inputs is the last: the one that writes, or, of a task
    that writes nothing (comparison.py), its last reduction, which then takes one pass."""
    return task.write if task.write.element_count or not task.reductions else task.reductions[-1]


@dataclass(frozen=True, slots=True)
class FetchNeeds:
    """What a merge must be able to hold of its inputs. In bytes.

    job_bytes: at most, of one worker's. task_bytes: all inputs of the largest output tensor.
    total_bytes: of all of them.
    whole_bytes: of files that are held from beginning to end, beside the others.
    """

    job_bytes: int
    task_bytes: int
    total_bytes: int
    whole_bytes: int = 0


def fetch_needs(
    graph: Graph, tasks: Sequence[TensorTask], paths: Mapping[str, object], device: DeviceClass
) -> FetchNeeds:
    """What the inputs of a merge occupy while they are worked on.

    tasks: all of them; those of one kind (likeness.py) may differ in what lies elsewhere, and in
        which rows they read.
    paths: of the files that lie elsewhere.
    """
    job = task = total = 0
    known: dict[object, int] = {}
    for each in tasks:
        for stage in each.stages:
            reads = [read for read in graph.reads_of(stage.id) if path_of(read) in paths]
            if not reads or not stage.element_count:
                continue
            key = (_work(stage), *map(_place, reads))
            if key not in known:
                span = SPAN_BLOCKS * elements_per_block(device, row_elements(graph, stage))
                held = sum(_held(read, stage.element_count, span) for read in reads)
                known[key] = max(held, sampled_bytes(graph, stage, paths))
            job = max(job, known[key])
        reads_all = [read for read in reads_of_task(graph, each) if path_of(read) in paths]
        size = sum(read.tensor.size_bytes for read in reads_all)
        task = max(task, size + 2 * CHUNK_BYTES * len(reads_all))
        total += size
    return FetchNeeds(job, task, total)


def _work(stage: Reduce | Write) -> object:
    """What a stage's blocks and samples follow from."""
    if isinstance(stage, Reduce):
        return (stage.operation, stage.parameters, stage.shape)
    return (stage.source, stage.shape)


def _place(read: Read) -> object:
    """What of an input decides which chunks are held."""
    if read.rows is None:
        return (read.dtype, read.shape)
    return (read.dtype, read.shape, read.rows.digest, read.tensor.start % CHUNK_BYTES)


def _held(read: Read, elements: int, span: int) -> int:
    """The chunks that hold a span of a tensor: up to one more at each end, and the gaps that lie in
    them. elements: of the stage."""
    size = read.tensor.size_bytes
    if not size:
        return 0
    if read.rows is None:
        if read.element_count == elements:
            size = min(size, span * DTYPES[read.dtype].item_bytes)
        return size + 2 * CHUNK_BYTES
    most = max(
        len(chunk_numbers_of_rows(read, start, min(start + span, elements)))
        for start in range(0, elements, span)
    )
    return min(most * CHUNK_BYTES, size + 2 * CHUNK_BYTES)


def rows_between(read: Read, start: int, stop: int) -> NDArray[numpy.int32]:
    """The rows of the file that an element range of an input in another order is made of, each
    once, ascending."""
    import numpy

    assert read.rows is not None
    table = numpy.frombuffer(read.rows.data, "<i4")
    rows = numpy.unique(table[start // read.row_elements : -(-stop // read.row_elements)])
    return rows[rows >= 0]


def chunk_numbers_of_rows(read: Read, start: int, stop: int) -> set[int]:
    """Which multiples of CHUNK_BYTES the rows begin or end in."""
    row_bytes = read.row_elements * DTYPES[read.dtype].item_bytes
    first = read.tensor.start + rows_between(read, start, stop).astype("int64") * row_bytes
    numbers: set[int] = set()
    for begin in first.tolist():
        numbers.update(range(begin // CHUNK_BYTES, (begin + row_bytes - 1) // CHUNK_BYTES + 1))
    return numbers


def sampled_bytes(graph: Graph, stage: Reduce | Write, paths: Mapping[str, object]) -> int:
    """The pages that hold a stage's sample, where it may begin with one: each run may lie in two
    pages of every input, or more where elements are large."""
    if not isinstance(stage, Reduce):
        return 0
    operation, parameters = reduce_operation(stage.operation), dict(stage.parameters)
    sample = operation.sample(parameters, stage.element_count)
    if sample is None:
        return 0
    reads = [read for read in graph.reads_of(stage.id) if path_of(read) in paths]
    return sum(
        sample.runs * (2 * mmap.PAGESIZE + sample.run_elements * DTYPES[read.dtype].item_bytes)
        for read in reads
    )
