"""Measuring how fast this machine would run a plan, in about half a second, on made-up data.

    computing   the plan's most common kinds of tensors, merged by the real workers and kernels with
                the plan's own programs, from a file in memory into files in memory
    reading     how much of the inputs the page cache holds (mincore, which reads nothing), and how
                fast the disk gives a library's file of this installation, past the cache
    writing     nothing, unless asked for
    network     nothing, unless asked for

No byte of the inputs' tensors is read and nothing is written. Where the inputs lie on another disk
than this installation, that disk's rate is not known then. With `touches_files` some stretches of
the inputs are read, past the cache and neither decoded nor kept, or fetched if they lie elsewhere,
and a file without a name is written in the output's folder, which is gone when it is closed.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..checkpoint.tensor import DTYPES
from ..engine import likeness
from ..engine.baseline import resident_bytes
from ..engine.memory import available_memory_bytes
from ..engine.plan import Plan
from ..engine.readahead import ReadAhead
from ..engine.recent import Recent
from ..engine.scheduler import Scheduler
from ..engine.stages import TensorTask, TorchLayout, bytes_read, stage_layout, tensor_tasks
from ..engine.torch_loading import load_torch
from ..engine.worker import Worker
from ..graph.graph import Graph
from ..graph.node import Node, Read, Write
from .disks import are_on_one_disk, cached_share, reading_rate, writing_rate
from .made_up import made_up
from .network import network_rate

if TYPE_CHECKING:
    from ..output.writer import ShardWriter

COMPUTING_SECONDS = 0.2
"""For all kinds of tensors together. Repeated measurements of the same merge differ by a tenth."""

MOST_KINDS = 3
MEASURED_SHARE = 0.9
"""Of the bytes to be read: kinds are measured, the largest first, until they are so much."""

MOST_TENSOR_BYTES = 64 << 20
MOST_MEMORY_BYTES = 256 << 20
"""What the made-up tensors may occupy: one of 13B (52 MB of float16) and what becomes of it."""

LEAST_MEMORY_BYTES = 1 << 20
AVAILABLE_SHARE = 0.25
"""Of the memory that is free: a dry run may have been started beside something large."""


@dataclass(frozen=True, slots=True)
class MeasuredKind:
    """How fast tensors of one kind are merged, their inputs being in memory.

    tensor: one of them. tensors: how many there are. bytes_read: over all of them and all passes.
    bytes_per_s: of what is read, by all workers together.
    """

    tensor: str
    tensors: int
    bytes_read: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found out about this machine. Rates in bytes per second; None: not known.

    kinds: the plan's most common kinds of tensors; empty: computing could not be measured.
    workers: that computed.
    cached_share: of the inputs, in the page cache now.
    reading_rate: of the inputs' disk; reading_basis: the file that was read for it.
    writing_rate: of the output's disk; writing_basis: "written", or "read" where it is how fast
        that disk reads.
    seconds: that it took.
    network_rate: of what is fetched over the network.
    """

    kinds: tuple[MeasuredKind, ...]
    workers: int
    cached_share: float | None
    reading_rate: float | None
    reading_basis: str | None
    writing_rate: float | None
    writing_basis: str | None
    seconds: float
    network_rate: float | None = None


def measure(plan: Plan, place: Path, *, touches_files: bool = False) -> Measured:
    """Measures what `estimate` needs to know.

    place: the output folder, or where it will be; it need not exist.
    touches_files: inputs may be read, and an unnamed file written in the place.
    """
    began = time.perf_counter()
    kinds = _computing(plan, loads_torch=touches_files)
    files = _input_files(plan)
    paths = [path for path, _ in files]
    reading, basis = reading_rate(paths, is_sample_allowed=touches_files)
    writing = writing_rate(place) if touches_files else None
    written = "written" if writing is not None else None
    if writing is None:
        is_same = are_on_one_disk([*paths, place])
        writing = reading if is_same else reading_rate([place], is_sample_allowed=False)[0]
        written = "read" if writing is not None else None
    return Measured(
        kinds=kinds,
        workers=plan.memory.workers,
        cached_share=cached_share(files),
        reading_rate=reading,
        reading_basis=basis,
        writing_rate=writing,
        writing_basis=written,
        network_rate=network_rate(plan) if touches_files else None,
        seconds=time.perf_counter() - began,
    )


def _input_files(plan: Plan) -> list[tuple[Path, int]]:
    """The files of the local disk with tensors that a run reads, and their sizes in bytes."""
    return [
        (Path(folder) / file.path, file.size_bytes)
        for checkpoint in plan.checkpoints.values()
        for folder, files in checkpoint.files_by_folder
        for file in files
        if f"{folder}/{file.path}" not in plan.remote_inputs
    ]


@dataclass(frozen=True, slots=True)
class Kind:
    """Tensors that the same operations make of inputs of the same dtypes.

    examples: the work of one of each shape. tensors: how many there are.
    bytes_read: over all of them and all passes.
    """

    examples: tuple[TensorTask, ...]
    tensors: int
    bytes_read: int


def kinds_of(plan: Plan) -> list[Kind]:
    """The plan's tensors by kind, those first of which most is read."""
    groups: dict[object, list[likeness.Kind]] = {}
    for alike in plan.kinds:
        if alike.first.write.element_count:
            groups.setdefault(_signature(plan.graph, alike.first), []).append(alike)
    kinds = [
        Kind(
            examples=tuple(alike.first for alike in group),
            tensors=sum(alike.count for alike in group),
            bytes_read=sum(alike.count * bytes_read(plan.graph, alike.first) for alike in group),
        )
        for group in groups.values()
    ]
    return sorted(kinds, key=lambda kind: -kind.bytes_read)


def _signature(graph: Graph, task: TensorTask) -> tuple[object, ...]:
    def of(node: Node) -> object:
        if isinstance(node, Read):
            return node.dtype
        if isinstance(node, Write):
            return (node.dtype, of(graph[node.source]))
        return (node.operation, tuple(of(graph[source]) for source in node.inputs))

    return (of(task.write), *map(of, task.reductions))


def _computing(plan: Plan, *, loads_torch: bool) -> tuple[MeasuredKind, ...]:
    if plan.execution.device != "cpu" or not hasattr(os, "memfd_create"):
        return ()
    kinds = kinds_of(plan)
    total = sum(kind.bytes_read for kind in kinds)
    chosen: list[tuple[Kind, TensorTask]] = []
    covered = 0
    for kind in kinds:
        if len(chosen) == MOST_KINDS or covered >= MEASURED_SHARE * total:
            break
        task = _representative(plan, kind)
        if task is not None and (loads_torch or not _needs_torch(plan, task)):
            chosen.append((kind, task))
            covered += kind.bytes_read
    if any(_needs_torch(plan, task) for _, task in chosen):
        load_torch()
        import torch  # noqa: F401  before time is taken: a second or two
    measured = []
    for kind, task in chosen:
        seconds = COMPUTING_SECONDS * kind.bytes_read / max(1, covered)
        rate = computing_rate(plan, task, max(seconds, COMPUTING_SECONDS / 10))
        if rate is not None:
            name = task.write.name
            measured.append(MeasuredKind(name, kind.tensors, kind.bytes_read, rate))
    return tuple(measured)


def _representative(plan: Plan, kind: Kind) -> TensorTask | None:
    """The largest tensor of a kind that there is room to make up."""
    held = resident_bytes() + plan.memory.workers * plan.memory.arena_bytes
    room = max(LEAST_MEMORY_BYTES, plan.memory.limit_bytes - held)
    room = min(room, MOST_MEMORY_BYTES, int(AVAILABLE_SHARE * available_memory_bytes()))
    most = min(MOST_TENSOR_BYTES, room // (1 + plan.memory.workers))
    best, best_bytes = None, 0
    for task in kind.examples:
        item_bytes = DTYPES[task.write.dtype].item_bytes
        size = task.write.element_count * max(4 if item_bytes > 2 else 2, item_bytes)
        if best_bytes < size <= most:
            reads = _reads(plan.graph, task)
            if all(r.rows is None and DTYPES[r.dtype].is_float for r in reads):
                best, best_bytes = task, size
    return best


def _reads(graph: Graph, task: TensorTask) -> list[Read]:
    return [read for stage in task.stages for read in graph.reads_of(stage.id)]


def _needs_torch(plan: Plan, task: TensorTask) -> bool:
    return any(
        isinstance(stage_layout(plan.graph, stage, plan.execution), TorchLayout)
        for stage in task.stages
    )


def computing_rate(plan: Plan, task: TensorTask, seconds: float) -> float | None:
    """Bytes of inputs that the plan's workers read and merge in a second, of made-up tensors like
    one of the plan's; None where nothing came of it.

    seconds: how long it may take.
    """
    with made_up(plan.graph, task) as (graph, files):
        tasks = tensor_tasks(graph)
        outputs = _Outputs(plan.memory.workers)
        moved = _Moved()
        scheduler = Scheduler(
            graph,
            tasks,
            lambda write, _: outputs.close(write.name),
            plan.execution.device,
            most_open=plan.memory.workers,
        )
        recent = Recent(8 * plan.memory.workers)
        read_ahead = ReadAhead(graph, tasks, files, plan.execution.device)
        workers = [
            Worker(
                graph,
                scheduler,
                cast("ShardWriter", outputs),
                files,
                plan.memory.arena_bytes,
                replace(plan.execution, read_mode="pread"),
                moved,
                lambda _: None,
                read_ahead,
                recent,
            )
            for _ in range(plan.memory.workers)
        ]
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
        try:
            for thread in threads:
                thread.start()
            deadline = time.perf_counter() + seconds
            for thread in threads:
                thread.join(max(0.0, deadline - time.perf_counter()))
        finally:
            scheduler.stop()
            for thread in threads:
                if thread.ident is not None:  # else it was interrupted before it began
                    thread.join()
            outputs.close_all()
        return None if scheduler.error is not None else moved.rate


class _Moved:
    """Counts what workers read, from the first block that is done to the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._first: float | None = None
        self._last = 0.0
        self._first_bytes = self._bytes = 0

    def __call__(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        with self._lock:
            self._last = time.perf_counter()
            self._bytes += bytes_read
            if self._first is None:
                self._first, self._first_bytes = self._last, bytes_read

    @property
    def rate(self) -> float | None:
        if self._first is None:
            return None
        if self._last > self._first and self._bytes > 2 * self._first_bytes:
            return (self._bytes - self._first_bytes) / (self._last - self._first)
        return self._bytes / (self._last - self._began)


class _Outputs:
    """Files in memory in place of an output's shards, one for each tensor in progress. Their pages
    are made anew for each, as those of a new file are."""

    def __init__(self, workers: int) -> None:
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def place(self, tensor: str) -> tuple[int, int]:
        """An open file, and where the tensor begins in it."""
        with self._lock:
            if tensor not in self._descriptors:
                self._descriptors[tensor] = os.memfd_create("lazymerge-measurement")
            return self._descriptors[tensor], 0

    def write(self, tensor: str, data: memoryview, offset: int) -> None:
        descriptor, _ = self.place(tensor)
        os.pwrite(descriptor, data, offset)

    def failure(self, tensor: str, error: OSError, size_bytes: int) -> Exception:
        return error

    def close(self, tensor: str) -> None:
        with self._lock:
            descriptor = self._descriptors.pop(tensor, None)
        if descriptor is not None:
            os.close(descriptor)

    def close_all(self) -> None:
        for tensor in list(self._descriptors):
            self.close(tensor)
