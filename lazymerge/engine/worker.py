"""A worker: takes jobs, runs their blocks in its arena, gives the results back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xxhash import xxh3_128

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Reduce
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
        stage = job.task.stages[job.stage]
        frame = self._frame_for(job)
        self._read_ahead.reached(job.task_index, job.pieces[0][0][0])
        bytes_per_element = sum(
            read.tensor.size_bytes for read in self._graph.reads_of(stage.id)
        ) / max(1, stage.element_count)
        partials: list[Any] = []
        if isinstance(stage, Reduce):
            operation = reduce_operation(stage.operation)
            pairs = Pairs(operation.joined, len(job.pieces)) if operation.is_joined else None
            for place, partial in enumerate(frame.run(job.pieces, job.state)):
                if self._scheduler.is_stopped:
                    return None
                elements = sum(stop - start for start, stop in job.pieces[place])
                if pairs is None:
                    partials.append(partial)
                else:
                    pairs.add(place, partial)
                self._moved(round(elements * bytes_per_element), 0, job.task.write.name)
            if pairs is not None:
                partials = [pairs.result]
        else:
            item_bytes = DTYPES[stage.dtype].item_bytes
            offset = job.pieces[0][0][0] * item_bytes
            checksum = xxh3_128()
            for data in frame.run(job.pieces, job.state):
                if self._scheduler.is_stopped:
                    return None
                checksum.update(data)
                if has_nonfinite(data, stage.dtype):
                    self._nonfinite(stage.name)
                self._writer.write(stage.name, data, offset)
                offset += len(data)
                bytes_read = round(len(data) / item_bytes * bytes_per_element)
                self._moved(bytes_read, len(data), stage.name)
            partials = [checksum.digest(), *[None] * (len(job.pieces) - 1)]
        frame.release(job.pieces[0][0][0], job.pieces[-1][-1][1])
        if self._forgets and not isinstance(stage, Reduce):
            frame.forget(job.pieces[0][0][0], job.pieces[-1][-1][1])
        return partials

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
