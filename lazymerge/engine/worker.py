"""A worker: takes jobs, runs their blocks in its arena, gives the results back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

from xxhash import xxh3_128

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Reduce, Write
from ..graph.operation import reduce_operation
from ..output.writer import PacedWriter, Writer
from .arena import Arena
from .device.frame import Lane
from .execution import Execution
from .fetching import Fetcher, FetchingStopped
from .finite import MASKS, has_nonfinite
from .frame import Frame, make_frame
from .inputs import InputFiles
from .native.frame import Kernels, NativeFrame
from .native.library import SHORT_BYTES, Sink
from .pairs import Pairs
from .readahead import ReadAhead
from .recent import Recent
from .scheduler import Job, Scheduler
from .stages import bytes_between, bytes_per_element, stage_layout


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of a span of blocks when it has been written.

    digest: its checksum. statistics: what was gathered of each block; empty: nothing.
    """

    digest: bytes
    statistics: Sequence[tuple[float, ...]] = ()


Nonfinite = Callable[[str], None]
"""Told of a tensor that inf or nan was written of."""

Moved = Callable[[int, int, str], None]
"""Told after every block, or some at once: bytes read, bytes written, name of the tensor."""


class Worker:
    """Runs jobs until there are none; one thread, one arena."""

    def __init__(
        self,
        graph: Graph,
        scheduler: Scheduler,
        writer: Writer | None,
        files: InputFiles,
        arena_bytes: int,
        execution: Execution,
        moved: Moved,
        nonfinite: Nonfinite,
        read_ahead: ReadAhead,
        recent: Recent,
        lane: Lane | None = None,
        forgets: bool = False,
        fetcher: Fetcher | None = None,
    ) -> None:
        """writer: None where nothing is written.

        read_ahead: is told what is being read. recent: what all workers share.

        forgets: inputs that have been written of leave the page cache.

        lane: the worker's share of a device, where one computes.

        fetcher: has the inputs that lie elsewhere; None: there are none.
        """
        self._fetcher = fetcher
        self._graph = graph
        self._scheduler = scheduler
        self._writer = writer
        self._paced = writer if isinstance(writer, PacedWriter) else None
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
        self._bytes_per_element = 0.0
        self._kernels = Kernels()
        self._sink = Sink()

    def run(self) -> None:
        """Works until the scheduler has no more to give; an error stops all workers."""
        try:
            self.arena.touch()
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
        if self._paced is None or not isinstance(stage, Write):
            return self._fetch_and_compute(job)
        first, last = job.pieces[0][0][0], job.pieces[-1][-1][1]
        place = stage.name, self._bytes_of(stage, 0, first), self._bytes_of(stage, 0, last)
        if not self._paced.await_room(*place, lambda: self._scheduler.is_stopped):
            return None
        partials = self._fetch_and_compute(job)
        if partials is not None:
            self._paced.written(*place)
        return partials

    def _fetch_and_compute(self, job: Job) -> list[Any] | None:
        if self._fetcher is None:
            return self._compute(job)
        try:
            self._fetcher.acquire(job)
        except FetchingStopped:
            return None
        partials = self._compute(job)
        if partials is not None:
            self._fetcher.release(job)
        return partials

    def _compute(self, job: Job) -> list[Any] | None:
        stage = job.task.stages[job.stage]
        frame = self._frame_for(job)
        start, stop = job.pieces[0][0][0], job.pieces[-1][-1][1]
        self._read_ahead.reached(job.task_index, start)
        if not isinstance(stage, Write):
            partials = self._reduce(frame, job, stage)
        elif isinstance(frame, NativeFrame) and self._bytes_of(stage, start, stop) > SHORT_BYTES:
            partials = self._write_at_once(frame, job, stage, start, stop)
        else:
            partials = self._write(frame, job, stage)
        if partials is None:
            return None
        frame.release()
        if self._forgets and isinstance(stage, Write):
            frame.forget(start, stop)
        return partials

    def _reduce(self, frame: Frame, job: Job, stage: Reduce) -> list[Any] | None:
        """One per block, or one that they were joined to."""
        operation = reduce_operation(stage.operation)
        partials = []
        pairs = Pairs(operation.joined, len(job.pieces)) if operation.is_joined else None
        for number, result in enumerate(frame.run(job.pieces, job.state)):
            if self._scheduler.is_stopped:
                return None
            if pairs is None:
                partials.append(result)
            else:
                pairs.add(number, result)
            bytes_read = sum(starmap(self._bytes_read, job.pieces[number]))
            self._moved(bytes_read, 0, job.task.write.name)
        return partials if pairs is None else [pairs.result]

    def _write(self, frame: Frame, job: Job, stage: Write) -> list[Any] | None:
        """The checksum of all blocks and their statistics, as what the first of them gives."""
        writer = self._writer
        assert writer is not None
        checksum = xxh3_128()
        offset = self._bytes_of(stage, 0, job.pieces[0][0][0])
        start = job.pieces[0][0][0]
        for data in frame.run(job.pieces, job.state):
            if self._scheduler.is_stopped:
                return None
            checksum.update(data)
            if has_nonfinite(data, stage.dtype):
                self._nonfinite(stage.name)
            writer.write(stage.name, data, offset)
            offset += len(data)
            stop = start + len(data) // DTYPES[stage.dtype].item_bytes
            self._moved(self._bytes_read(start, stop), len(data), stage.name)
            start = stop
            del data  # it may be part of a mapped window
        written = Written(checksum.digest(), frame.take_statistics())
        return [written, *[None] * (len(job.pieces) - 1)]

    def _write_at_once(
        self, frame: NativeFrame, job: Job, stage: Write, start: int, stop: int
    ) -> list[Any]:
        """The same in one call of the native kernels, without the interpreter lock."""
        sink, writer = self._sink, self._writer
        assert writer is not None
        descriptor, first_byte = writer.place(stage.name)
        sink.begin(descriptor, first_byte + self._bytes_of(stage, 0, start), MASKS[stage.dtype])
        if not frame.write(start, stop, sink):
            error = OSError(sink.error, os.strerror(sink.error))
            raise writer.failure(stage.name, error, sink.unwritten) from error
        if sink.is_nonfinite:
            self._nonfinite(stage.name)
        bytes_written = self._bytes_of(stage, start, stop)
        self._moved(self._bytes_read(start, stop), bytes_written, stage.name)
        written = Written(sink.digest(), frame.take_statistics())
        return [written, *[None] * (len(job.pieces) - 1)]

    def _bytes_read(self, start: int, stop: int) -> int:
        return bytes_between(self._bytes_per_element, start, stop)

    @staticmethod
    def _bytes_of(stage: Write, start: int, stop: int) -> int:
        return (stop - start) * DTYPES[stage.dtype].item_bytes

    def _frame_for(self, job: Job) -> Frame:
        key = (job.task_index, job.stage)
        if self._frame is None or key != self._frame_of:
            stage = job.task.stages[job.stage]
            self._frame = None
            self._bytes_per_element = bytes_per_element(self._graph, stage)
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
                self._kernels,
                self._lane,
            )
            self._frame_of = key
        return self._frame
