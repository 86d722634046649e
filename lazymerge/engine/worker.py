"""A worker: takes jobs, runs their blocks in its arena, gives the results back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from xxhash import xxh3_128_digest

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Reduce, Write
from ..output.writer import ShardWriter
from .arena import Arena
from .device.frame import DeviceFrame, Lane
from .execution import Execution
from .frame import Frame, make_frame
from .inputs import InputFiles
from .readahead import ReadAhead
from .scheduler import Job, Scheduler
from .stages import stage_layout

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
        read_ahead: ReadAhead,
        lane: Lane | None = None,
    ) -> None:
        """read_ahead: is told what is being read.

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
        self._read_ahead = read_ahead
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
        self._read_ahead.reached(job.task_index, job.first)
        block_bytes_read = sum(
            read.tensor.size_bytes for read in self._graph.reads_of(stage.id)
        ) / max(1, stage.element_count)
        partials: list[Any] = []
        for pieces, outcome in zip(job.pieces, _outcomes(frame, stage, job), strict=True):
            if self._scheduler.is_stopped:
                return None
            elements = sum(stop - start for start, stop in pieces)
            if isinstance(stage, Reduce):
                partials.append(outcome)
                written = 0
            else:
                partials.append(xxh3_128_digest(outcome))
                offset = pieces[0][0] * DTYPES[stage.dtype].item_bytes
                self._writer.write(stage.name, outcome, offset)
                written = len(outcome)
            self._moved(round(elements * block_bytes_read), written, job.task.write.name)
        frame.release(job.pieces[0][0][0], job.pieces[-1][-1][1])
        return partials

    def _frame_for(self, job: Job) -> Frame:
        key = (job.task_index, job.stage)
        if self._frame is None or key != self._frame_of:
            stage = job.task.stages[job.stage]
            self._frame = None
            self._frame = make_frame(
                self._graph,
                stage,
                stage_layout(self._graph, stage, self._execution),
                self.arena,
                self._files,
                job.prepared,
                self._execution.read_mode,
                self._lane,
            )
            self._frame_of = key
        return self._frame


def _outcomes(frame: Frame, stage: Reduce | Write, job: Job) -> Iterator[Any]:
    """What the blocks of a job yield: partial results, or bytes that are valid until the next."""
    if isinstance(frame, DeviceFrame):
        yield from frame.run(job.pieces, job.state)  # several at a time
        return
    for pieces in job.pieces:
        if isinstance(stage, Reduce):
            yield frame.reduce(pieces, job.state)
        else:
            ((start, stop),) = pieces
            yield frame.encode(start, stop)
