"""Comparing two models: one pass over both, as a plan says (comparison.py). Nothing is written.

    integers first, byte by byte ─► the others, by the scheduler and workers of a merge

What lies elsewhere is fetched ahead, as for a merge.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from typing import Any

from ..graph.node import Write
from ..graph.operations.statistics import added, moments_of
from .baseline import peak_resident_bytes, store_baseline
from .byte_streams import ByteStreams, Stamps
from .comparison import Comparison, ComparisonPlan, places_of
from .download import download, missing_files
from .fetching import Fetcher
from .inputs import InputFiles, read_exactly
from .memory import connection_bytes
from .readahead import ReadAhead
from .recent import Recent
from .scheduler import Scheduler
from .stamps import changed_since, stamps_of_models
from .statistics import TensorStatistics
from .streaming import one_torch_thread, run_workers
from .worker import Worker

COMPARED_BYTES = 1 << 20
"""Of integers, read from each model at a time."""


def run_comparison(
    plan: ComparisonPlan, moved: Callable[[int, str], None] = lambda count, name: None
) -> Comparison:
    """Reads both models.

    moved: is told of bytes that were read, and of the tensor; from the workers' threads.

    Raises:
        LazymergeError: a file cannot be read, or changes. InputError: one that lies elsewhere.
        DoesNotFitError: what is to be downloaded does not fit on the disk.
    """
    missing = missing_files(plan.checkpoints, "", ())
    missing = tuple(f for f in missing if f"{f.source.folder}/{f.name}" not in plan.remote)
    if missing:
        download(missing, plan.checkpoints)
    began = time.perf_counter()
    stamps = stamps_of_models(plan.checkpoints, plan.remote)
    total = 0
    numbers: dict[str, array[float]] = {}
    lock = threading.Lock()

    def read(count: int, _: int, name: str) -> None:
        nonlocal total
        with lock:
            total += count
        moved(count, name)

    def finished(write: Write, partials: Sequence[tuple[float, ...]]) -> None:
        with lock:
            numbers[write.name] = array("d", added(partials))

    unequal, held = _compare_integers(plan, stamps, read)
    held = max(held, _stream(plan, stamps, read, finished))
    changed_since(stamps, plan.checkpoints, plan.remote)
    for remote in plan.remote.values():
        remote.check()
    return Comparison(
        plan=plan,
        tensors={
            task.write.name: TensorStatistics(
                task.write.name,
                task.reductions[-1].element_count,
                (plan.models[0],),
                moments_of(numbers[task.write.name]),
            )
            for task in plan.tasks
        },
        unequal_integers=unequal,
        seconds=time.perf_counter() - began,
        bytes_read=total,
        measured_bytes=peak_resident_bytes() + held,  # which is not of the resident set
    )


def _stream(
    plan: ComparisonPlan,
    stamps: Stamps,
    read: Callable[[int, int, str], None],
    finished: Callable[[Write, Sequence[Any]], None],
) -> int:
    """Reads all tensors of floating point numbers. Returns the most that was held at a time of what
    lies elsewhere, in bytes."""
    execution, memory = plan.resources.execution, plan.memory
    numbers = {task.write.name: number for number, task in enumerate(plan.tasks)}

    def finished_one(write: Write, partials: Sequence[Any]) -> None:
        finished(write, partials)
        if fetcher is not None:
            fetcher.finished(numbers[write.name])

    scheduler = Scheduler(
        plan.graph, plan.tasks, finished_one, execution.device, most_open=memory.workers
    )
    fetcher = None
    if plan.remote:
        budget = memory.fetch_bytes - connection_bytes(execution.network)
        fetcher = Fetcher(
            plan.graph,
            plan.tasks,
            plan.remote,
            budget,
            memory.workers,
            lambda: scheduler.is_stopped,
        )
    files = InputFiles(stamps, None if fetcher is None else fetcher.descriptors)
    recent = Recent(8 * memory.workers)
    ahead = ReadAhead(plan.graph, plan.tasks, files, execution.device)
    try:
        with one_torch_thread() if memory.libraries == "torch" else nullcontext():
            workers = [
                Worker(
                    plan.graph,
                    scheduler,
                    None,
                    files,
                    memory.arena_bytes,
                    execution,
                    read,
                    lambda tensor: None,
                    ahead,
                    recent,
                    fetcher=fetcher,
                )
                for _ in range(memory.workers)
            ]
            run_workers(scheduler, workers)
    finally:
        files.close()
        if fetcher is not None:
            fetcher.close()
    store_baseline(memory.libraries)
    return 0 if fetcher is None else fetcher.most_held_bytes


def _compare_integers(
    plan: ComparisonPlan, stamps: Stamps, read: Callable[[int, int, str], None]
) -> tuple[tuple[str, ...], int]:
    """Names of tensors of integers whose bytes are not the same in both models; and the most that
    was held at a time of what lies elsewhere."""
    if not plan.integers:
        return (), 0
    budget = plan.memory.fetch_bytes - connection_bytes(plan.resources.network)
    reader = ByteStreams(plan.bytes_compared, plan.remote, budget, stamps=stamps)
    with closing(reader):
        unequal = tuple(
            name
            for number, name in enumerate(plan.integers)
            if not _same_integers(plan, number, reader, read)
        )
    return unequal, reader.held_bytes


def _same_integers(
    plan: ComparisonPlan,
    number: int,
    reader: ByteStreams,
    read: Callable[[int, int, str], None],
) -> bool:
    """Whether a tensor's bytes are the same in both models. number: of the tensor."""
    name = plan.integers[number]
    places = [
        (os.path.join(folder, info.file), info.start)
        for folder, info in places_of(plan.checkpoints, name)
    ]
    rooms = [memoryview(bytearray(COMPARED_BYTES)) for _ in places]
    for begin, end in reader.spans(number):
        for done in range(begin, end, COMPARED_BYTES):
            count = min(COMPARED_BYTES, end - done)
            for (path, start), room in zip(places, rooms, strict=True):
                descriptor = reader.files.descriptor(path)
                read_exactly(descriptor, room[:count], start + done, path)
            read(2 * count, 0, name)
            if rooms[0][:count] != rooms[1][:count]:
                return False
    return True
