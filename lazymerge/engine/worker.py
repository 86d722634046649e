"""A worker: takes jobs, runs their blocks in its arena, gives the results back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xxhash import xxh3_128

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Reduce, Write
from ..graph.operation import reduce_operation
from ..output.writer import ShardWriter
from .arena import Arena
from .device.frame import Lane
from .execution import Execution
from .finite import has_nonfinite
from .frame import Frame, make_frame
from .inputs import InputFiles
from .pairs import Pairs
from .readahead import ReadAhead
from .recent import Recent
from .scheduler import Job, Scheduler
from .stages import stage_layout

Nonfinite = Callable[[str], None]
"""Told of a tensor that inf or nan was written of."""

Moved = Callable[[int, int, str], None]
"""Told after every block: bytes read, bytes written, name of the tensor."""


class Worker:
    """Runs jobs until there are none; one thread, one arena."""

    def __init__(
        self,
        graph: Graph,
        scheduler: Scheduler,
        writer: ShardWriter,
        files: InputFiles,
        arena_bytes: int,
        execution: Execution,
        moved: Moved,
        nonfinite: Nonfinite,
        read_ahead: ReadAhead,
        recent: Recent,
        lane: Lane | None = None,
        forgets: bool = False,
    ) -> None:
        """read_ahead: is told what is being read. recent: what all workers share.

        forgets: inputs that have been written of leave the page cache.

        lane: the worker's share of a device, where one computes.
        """
        self._graph = graph
        self._scheduler = scheduler
        self._writer = writer
        self._files = files
        self.arena = Arena(arena_bytes)
        self._lane = lane
        self._execution = execution
        self._moved = moved
        self._nonfinite = nonfinite
        self._read_ahead = read_ahead
        self._recent = recent
        self._forgets = forgets
        self._frame: Frame | None = None
        self._frame_of: tuple[int, int] = (-1, -1)

    def run(self) -> None:
        """Works until the scheduler has no more to give; an error stops all workers."""
        try:
            while (job := self._scheduler.take()) is not None:
                partials = self._run(job)
                if partials is None:
                    return
                self._scheduler.give(job, partials)
        except BaseException as error:
            self._scheduler.stop(error)

    def _run(self, job: Job) -> list[Any] | None:
        """The partial results of a job's blocks; None if everything has been stopped."""
        stage = job.task.stages[job.stage]
        frame = self._frame_for(job)
        self._read_ahead.reached(job.task_index, job.pieces[0][0][0])
        bytes_per_element = sum(
            read.tensor.size_bytes for read in self._graph.reads_of(stage.id)
        ) / max(1, stage.element_count)
        results = _Results(job, stage)
        for result in frame.run(job.pieces, job.state):
            if self._scheduler.is_stopped:
                return None
            elements = results.add(result)
            written = 0
            if isinstance(stage, Write):
                written = len(result)
                if has_nonfinite(result, stage.dtype):
                    self._nonfinite(stage.name)
                self._writer.write(stage.name, result, results.written - written)
            self._moved(round(elements * bytes_per_element), written, job.task.write.name)
            del result  # it may be part of a mapped window
        frame.release()
        if self._forgets and isinstance(stage, Write):
            frame.forget(job.pieces[0][0][0], job.pieces[-1][-1][1])
        return results.partials()

    def _frame_for(self, job: Job) -> Frame:
        key = (job.task_index, job.stage)
        if self._frame is None or key != self._frame_of:
            stage = job.task.stages[job.stage]
            self._frame = None
            self._frame = make_frame(
                self._graph,
                stage,
                self._recent.get(
                    ("layout", stage.id),
                    None,
                    lambda: stage_layout(self._graph, stage, self._execution),
                ),
                self.arena,
                self._files,
                job.prepared,
                self._execution.read_mode,
                self._recent,
                self._lane,
            )
            self._frame_of = key
        return self._frame


class _Results:
    """What the blocks of a job have given so far."""

    def __init__(self, job: Job, stage: Reduce | Write) -> None:
        self._job = job
        self._count = 0
        self._partials: list[Any] = []
        self._pairs: Pairs[Any] | None = None
        self._checksum = xxh3_128()
        self._item_bytes = 0
        self.written = 0
        """Where the bytes end that have been written, from the tensor's first."""
        if isinstance(stage, Write):
            self._item_bytes = DTYPES[stage.dtype].item_bytes
            self.written = job.pieces[0][0][0] * self._item_bytes
        else:
            operation = reduce_operation(stage.operation)
            if operation.is_joined:
                self._pairs = Pairs(operation.joined, len(job.pieces))

    def add(self, result: Any) -> int:
        """Takes what a frame yields; returns the number of elements it is of."""
        if self._item_bytes:
            self._checksum.update(result)
            self.written += len(result)
            return len(result) // self._item_bytes
        if self._pairs is None:
            self._partials.append(result)
        else:
            self._pairs.add(self._count, result)
        self._count += 1
        return sum(stop - start for start, stop in self._job.pieces[self._count - 1])

    def partials(self) -> list[Any]:
        """For the scheduler: one per block, or one that they were joined to."""
        if self._item_bytes:
            return [self._checksum.digest(), *[None] * (len(self._job.pieces) - 1)]
        return self._partials if self._pairs is None else [self._pairs.result]
