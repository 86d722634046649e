"""Streaming output tensors through workers: what a run does with what is missing of its output, and
a machine of a cluster with the group of tensors that it is given.

    Work ─► Scheduler ─► Worker threads ─► writer
                              └─► Told: began, moved, finished (checksum, inf or nan, statistics)
"""

from __future__ import annotations

import os
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from xxhash import xxh3_128_hexdigest

from ..graph.graph import Graph
from ..graph.node import Write
from ..graph.operations.statistics import added
from ..output.writer import Writer
from . import torch_loading
from .complete import NonfiniteError, nonfinite_error
from .counted_input import counted
from .device.frame import Lane
from .device.interface import Device
from .device.memory import open_lanes
from .execution import Execution
from .fetching import Fetcher
from .inputs import InputFiles
from .memory import MemoryPlan
from .native.bus_error import explained_bus_errors
from .readahead import ReadAhead
from .recent import Recent
from .remote_inputs import Distant
from .remote_reading import open_fetcher, tell_of_cache
from .scheduler import Scheduler
from .stages import TensorTask
from .worker import Worker, Written

if TYPE_CHECKING:
    from .plan import Plan

WAKE_SECONDS = 0.1
"""How often the waiting main thread looks up, so that Ctrl-C is answered."""

PATIENCE_SECONDS = 1.0
"""How long an interrupted command waits for the blocks in flight; a block of 2^18 elements takes a
millisecond, a function of the user's over a whole tensor may take a minute. Its process then ends
all the same, within two seconds of the signal."""

YIELDING_NICENESS = 5
"""Of workers whose inputs come over the network, above the process's own: one thread has all that
comes, and workers that take its processor slow all connections down. With two processors, ties over
three models of 503 MB took 11% less time so; with 10 no less than with 5."""

Stamps = Mapping[str, tuple[int, int]]
"""Sizes of files, and when they were modified last (nanoseconds since 1970), by path."""


@dataclass(frozen=True, slots=True)
class Work:
    """Output tensors to be made, and what that may take.

    remote_inputs: input files that are read over the network, by path.
    forgets: inputs that have been written of leave the page cache.
    """

    graph: Graph
    tasks: Sequence[TensorTask]
    execution: Execution
    memory: MemoryPlan
    remote_inputs: Mapping[str, Distant] = field(default_factory=dict)
    forgets: bool = False


def work_of(plan: Plan, tasks: Sequence[TensorTask], *, forgets: bool) -> Work:
    """Some tasks of a plan, to be done in this process."""
    return Work(plan.graph, tasks, plan.execution, plan.memory, plan.remote_inputs, forgets)


@dataclass(frozen=True, slots=True)
class FinishedTensor:
    """An output tensor whose bytes have all been handed to the writer.

    checksum: as the manifest defines it. is_nonfinite: it holds inf or nan.
    statistics: gathered of it, float64; empty: none were.
    """

    name: str
    checksum: str
    is_nonfinite: bool
    statistics: array[float]


class Told(Protocol):
    """Is told how the work proceeds, from the workers' threads."""

    def began(self, tensor: str) -> None:
        """Work on an output tensor begins."""

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        """A block was done, or several at once."""

    def fetched(self, size_bytes: int) -> None:
        """So many more bytes have come over the network."""

    def finished(self, tensor: FinishedTensor) -> None:
        """An output tensor is complete."""

    def noted(self, message: str) -> None:
        """Something that a person should know."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """On which workers go on.

    stamps: what input files must be when they are opened.
    check: is called every WAKE_SECONDS; if it raises, the workers are stopped.
    strict: inf or nan in the output is an error.
    """

    stamps: Stamps
    check: Callable[[], None] = lambda: None
    strict: bool = False


def stream(
    work: Work,
    writer: Writer,
    told: Told,
    conditions: Conditions,
    *,
    where: Path | str,
    device: Device | None = None,
) -> int:
    """Makes output tensors; returns the most bytes of fetched inputs that were held at a time.

    where: the output, for messages.
    device: the accelerator that computes, if one does.

    Raises:
        LazymergeError: reading or writing fails, or a tensor holds inf or nan and may not.
        AbandonedError: interrupted, and workers still run.
    """
    done = _Collector(work, told, strict=conditions.strict)
    scheduler = Scheduler(
        work.graph,
        work.tasks,
        done.finished,
        work.execution.device,
        most_open=work.memory.workers,
        began=told.began,
    )
    fetcher = done.fetcher = _fetcher(work, scheduler, told)
    files = InputFiles(conditions.stamps, None if fetcher is None else fetcher.descriptors)
    is_mapped = work.execution.read_mode == "mmap"
    recent = Recent(8 * work.memory.workers)
    read_ahead = ReadAhead(work.graph, work.tasks, files, work.execution.device)
    try:
        with (
            one_torch_thread() if work.memory.libraries == "torch" else nullcontext(),
            explained_bus_errors(where) if is_mapped else nullcontext() as files.watch,
        ):
            workers = [
                Worker(
                    work.graph,
                    scheduler,
                    writer,
                    files,
                    work.memory.arena_bytes,
                    work.execution,
                    told.moved,
                    done.found_nonfinite,
                    read_ahead,
                    recent,
                    lane,
                    work.forgets,
                    fetcher,
                )
                for lane in _lanes(work, device)
            ]
            if device is not None:
                for worker in workers:
                    device.pin(worker.arena)
            run_workers(scheduler, workers, conditions.check, yields=fetcher is not None)
        files.check()
    except AbandonedError as error:
        error.close_inputs = lambda: _close(files, fetcher)  # a worker may be reading on
        raise
    except BaseException:
        _close(files, fetcher)
        raise
    if fetcher is not None:
        tell_of_cache(fetcher, told.noted)
    _close(files, fetcher)
    return 0 if fetcher is None else fetcher.most_held_bytes


class _Collector:
    """Puts together what workers give for the spans of a tensor."""

    def __init__(self, work: Work, told: Told, *, strict: bool) -> None:
        self._told = told
        self._strict = strict
        self._numbers = {task.write.name: n for n, task in enumerate(work.tasks)}
        self._nonfinite: set[str] = set()
        self._lock = threading.Lock()
        self.fetcher: Fetcher | None = None

    def finished(self, write: Write, blocks: Sequence[Written | None]) -> None:
        spans = [span for span in blocks if span is not None]
        gathered = [numbers for span in spans for numbers in span.statistics]
        self._told.finished(
            FinishedTensor(
                write.name,
                xxh3_128_hexdigest(b"".join(span.digest for span in spans)),
                write.name in self._nonfinite,
                array("d", added(gathered) if gathered else ()),
            )
        )
        if self.fetcher is not None:
            self.fetcher.finished(self._numbers[write.name])

    def found_nonfinite(self, tensor: str) -> None:
        if self._strict:
            raise NonfiniteError(nonfinite_error(tensor))
        with self._lock:
            self._nonfinite.add(tensor)


def _fetcher(work: Work, scheduler: Scheduler, told: Told) -> Fetcher | None:
    """What has the inputs that lie elsewhere, where there are some."""
    if not work.remote_inputs:
        return None
    return open_fetcher(
        work.graph,
        work.tasks,
        counted(work.remote_inputs, told.fetched),
        work.execution.network,
        work.memory,
        lambda: scheduler.is_stopped,
        told.noted,
    )


def _close(files: InputFiles, fetcher: Fetcher | None) -> None:
    files.close()
    if fetcher is not None:
        fetcher.close()


def _lanes(work: Work, device: Device | None) -> Sequence[Lane | None]:
    """Each worker's share of the device, where one computes."""
    if device is None:
        return [None] * work.memory.workers
    return open_lanes(device, work.memory)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Parallelism is between workers, on different blocks."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class AbandonedError(KeyboardInterrupt):
    """Interrupted, and a worker did not stop in time, or there was no time to wait for it: it may
    still be writing.

    running: events, set when the workers have ended.
    close_inputs: closes the files that they may be reading.
    """

    def __init__(self, running: Sequence[threading.Event]) -> None:
        super().__init__()
        self.running = running
        self.close_inputs: Callable[[], None] = lambda: None


def run_workers(
    scheduler: Scheduler,
    workers: Sequence[Worker],
    check: Callable[[], None] = lambda: None,
    *,
    yields: bool = False,
) -> None:
    """Runs all workers to the end; an error or an interruption stops them first.

    check: is called every WAKE_SECONDS; if it raises, the workers are stopped.
    yields: to the process's other threads, where processors are short.

    Waits for events and not by Thread.join: a join that Ctrl-C interrupts may take a thread that
    still runs for one that has ended, and a worker must not write on while the output is being
    removed.
    """

    def run_to_the_end(worker: Worker, ended: threading.Event) -> None:
        try:
            if yields:
                _yield_to_other_threads()
            worker.run()
        finally:
            ended.set()

    ends = [threading.Event() for _ in workers]
    threads = [
        threading.Thread(target=run_to_the_end, args=pair, name=f"worker-{number}", daemon=True)
        for number, pair in enumerate(zip(workers, ends, strict=True))
    ]
    try:
        for thread in threads:
            thread.start()
        for ended in ends:
            while not ended.wait(WAKE_SECONDS):
                check()
    except BaseException as error:
        scheduler.stop()
        # one that has no number yet, for start() was interrupted, will find no work any more
        running = [e for e, thread in zip(ends, threads, strict=True) if thread.ident]
        is_bounded = torch_loading.is_own_process and isinstance(error, KeyboardInterrupt)
        try:
            _wait_for(running, PATIENCE_SECONDS if is_bounded else None)
        except KeyboardInterrupt:  # once more
            raise AbandonedError(running) from error
        raise
    for thread in threads:
        thread.join()
    if scheduler.error is not None:
        raise scheduler.error


def _yield_to_other_threads() -> None:
    """Makes this thread nicer than those that have the network's bytes. Linux alone has a
    niceness of threads."""
    if sys.platform == "linux":
        own = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(
                os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + YIELDING_NICENESS
            )


def _wait_for(ends: Sequence[threading.Event], seconds: float | None) -> None:
    """Waits for all events.

    seconds: at most.

    Raises:
        KeyboardInterrupt: they have not all come in time, or it was interrupted.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    for ended in ends:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not ended.wait(left):
            raise KeyboardInterrupt
