"""How two models differ, tensor by tensor, in one pass over both under the memory limit.

    headers ─► what only one has, other shapes, other dtypes        (plan_comparison)
    Read a, Read b ─► Reduce merge_statistics, one for each tensor  (run_comparison)

Nothing is written. A task of the engine ends with a tensor that is written; here that is an empty
one, which takes no pass, so that all there is to a task is its reduction.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import open_model
from ..checkpoint import Checkpoint
from ..checkpoint.tensor import DTYPES, TensorInfo
from ..errors import InputError
from ..graph.graph import Graph
from ..graph.node import Read, Reduce, Write, as_parameters
from ..graph.operations.adapters import add_adapted
from ..graph.operations.block_scales import add_dequantised
from ..graph.operations.statistics import MergeStatistics, added, moments_of
from ..graph.targets import natural_order
from ..output.checksum import file_checksum
from ..vocabulary.files import is_tokenizer_file
from .baseline import peak_resident_bytes, resident_bytes, store_baseline
from .download import download, missing_files
from .inputs import InputFiles, read_exactly
from .likeness import kinds_of
from .memory import MemoryPlan, default_limit_bytes, default_workers, plan_memory
from .plan import Resources, aligned
from .readahead import ReadAhead
from .recent import Recent
from .run import changed_since, stamps_of_models
from .scheduler import Scheduler
from .stages import TensorTask
from .statistics import TensorStatistics
from .streaming import one_torch_thread, run_workers
from .worker import Worker

COMPARED_BYTES = 1 << 20
"""Of integers, read from each model at a time."""

VOLATILE_KEYS = frozenset({"_name_or_path", "transformers_version"})
"""Of a config: they say where and by what it was written."""

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Something that both models have, and not alike; None where one has none."""

    name: str
    first: str | None
    second: str | None


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """What there is to compare, from headers alone.

    models: references, the one that is compared with first.
    checkpoints: of both, with names as the first writes them.
    graph, tasks: the work. integers: names of tensors that are compared byte by byte.
    only_first, only_second: names of tensors that the other lacks.
    shapes, dtypes, config, files: what differs in them.
    notices: how the models were read; one sentence each.
    """

    models: tuple[str, str]
    checkpoints: tuple[Checkpoint, Checkpoint]
    graph: Graph
    tasks: tuple[TensorTask, ...]
    integers: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    shapes: tuple[Mismatch, ...]
    dtypes: tuple[Mismatch, ...]
    config: tuple[Mismatch, ...]
    files: tuple[Mismatch, ...]
    notices: tuple[str, ...]
    memory: MemoryPlan
    resources: Resources

    @property
    def bytes_read(self) -> int:
        """Of tensors, from both models."""
        integers = sum(
            checkpoint.tensors[name].size_bytes
            for checkpoint in self.checkpoints
            for name in self.integers
        )
        reads = (
            read
            for task in self.tasks
            for reduce in task.reductions
            for read in self.graph.reads_of(reduce.id)
        )
        return integers + sum(read.size_bytes for read in reads)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two models differ.

    plan: what is known from headers.
    tensors: of floating point numbers, by name; the first model is the reference, the second what
        it is compared with.
    unequal_integers: names of tensors of integers or booleans that differ.
    seconds: from the first block to the last. measured_bytes: the process's peak resident set.
    """

    plan: ComparisonPlan
    tensors: Mapping[str, TensorStatistics]
    unequal_integers: tuple[str, ...]
    seconds: float
    bytes_read: int
    measured_bytes: int

    @property
    def equal(self) -> tuple[str, ...]:
        """Names of tensors that have the same elements in both; 0 equals -0."""
        floats = [name for name, tensor in self.tensors.items() if is_equal(tensor)]
        unequal = set(self.unequal_integers)
        return (*floats, *(name for name in self.plan.integers if name not in unequal))

    @property
    def is_same(self) -> bool:
        """Whether weights, config and tokenizer agree."""
        plan = self.plan
        differing = (plan.only_first, plan.only_second, plan.shapes, plan.dtypes, plan.config)
        return not any((*differing, plan.files)) and len(self.equal) == len(self.tensors) + len(
            plan.integers
        )


def is_equal(tensor: TensorStatistics) -> bool:
    """Whether a tensor has the same elements in both models; nan equals nothing."""
    moments = tensor.moments
    return moments is not None and moments.products[-1][-1] == 0 == moments.agreements[-1][-1]


def plan_comparison(
    first: str,
    second: str,
    resources: Resources | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> ComparisonPlan:
    """Plans a comparison from the headers of both models.

    wanted: says by their names which tensors are compared.

    Raises:
        InputError: a model cannot be opened.
        DoesNotFitError: the memory does not suffice.
    """
    resources = resources or Resources()
    one, other = open_model(first), open_model(second)
    pair, notices = aligned(one, {0: one, 1: other}, {0: first, 1: second})
    models = (pair[0], pair[1])
    graph = Graph()
    tasks: list[TensorTask] = []
    integers: list[str] = []
    shapes: list[Mismatch] = []
    dtypes: list[Mismatch] = []
    names = [name for name in models[0].tensors if name in models[1].tensors and wanted(name)]
    for name in sorted(names, key=natural_order):
        infos = (models[0].tensors[name], models[1].tensors[name])
        if infos[0].dtype != infos[1].dtype:
            dtypes.append(Mismatch(name, infos[0].dtype, infos[1].dtype))
        if infos[0].shape != infos[1].shape:
            shapes.append(Mismatch(name, str(list(infos[0].shape)), str(list(infos[1].shape))))
        elif all(DTYPES[info.dtype].is_float for info in infos):
            if infos[0].element_count:
                tasks.append(_task(graph, name, models, infos))
        elif infos[0].dtype == infos[1].dtype:
            integers.append(name)
    if not any(wanted(name) for model in models for name in model.tensors):
        raise InputError(
            f"no tensor of {first} or {second} is asked for; look at their names with: "
            f"lazymerge inspect {first} --tensors"
        )
    if resources.execution.device != "cpu":
        raise InputError("models are compared by the processor; leave --device out")
    return ComparisonPlan(
        models=(first, second),
        checkpoints=models,
        graph=graph,
        tasks=tuple(tasks),
        integers=tuple(integers),
        only_first=_only(models[0], models[1], wanted),
        only_second=_only(models[1], models[0], wanted),
        shapes=tuple(shapes),
        dtypes=tuple(dtypes),
        config=tuple(_config_differences(one.config, other.config)),
        files=tuple(_file_differences(one, other)),
        notices=(*notices, *one.notices, *other.notices),
        memory=plan_memory(
            graph,
            kinds_of(graph, tasks),
            resources.limit_bytes or default_limit_bytes(),
            resources.workers or default_workers(),
            resources.execution,
            held_bytes=resident_bytes(),
        ),
        resources=resources,
    )


def _only(model: Checkpoint, other: Checkpoint, wanted: Callable[[str], bool]) -> tuple[str, ...]:
    names = [name for name in model.tensors if name not in other.tensors and wanted(name)]
    return tuple(sorted(names, key=natural_order))


def _task(
    graph: Graph,
    name: str,
    models: tuple[Checkpoint, Checkpoint],
    infos: tuple[TensorInfo, TensorInfo],
) -> TensorTask:
    is_wide = any(info.dtype == "F64" or info.scale is not None for info in infos)
    nodes = tuple(
        _node(graph, model, info, is_wide=is_wide)
        for model, info in zip(models, infos, strict=True)
    )
    reduce = Reduce(
        operation=MergeStatistics.name,
        parameters=as_parameters({"is_merge": False}),
        inputs=nodes,
        statistics=(),
        shape=infos[0].shape,
        working_dtype="F64" if is_wide else "F32",
    )
    reductions = graph.reductions_of(graph.add(reduce))
    write = Write(name, "U8", (0,), nodes[0])
    graph.add(write)
    return TensorTask(write, reductions)


def _node(graph: Graph, model: Checkpoint, info: TensorInfo, *, is_wide: bool) -> str:
    """What yields a tensor's values: stored numbers with their scales and an adapter's change."""
    stored = Read(info.folder or model.folder, info.stored)
    node = graph.add(stored) if info.scale is None else add_dequantised(graph, stored, info.scale)
    if info.change is None:
        return node
    return add_adapted(graph, node, info.change, is_wide=is_wide)


def _config_differences(
    one: Mapping[str, Any] | None, other: Mapping[str, Any] | None
) -> Iterator[Mismatch]:
    """Keys of config.json, dotted where one config lies in another."""
    values = [dict(_flat(config or {}, "")) for config in (one, other)]
    for key in sorted({*values[0], *values[1]}):
        found = [each.get(key, _ABSENT) for each in values]
        if found[0] != found[1]:
            shown = [None if value is _ABSENT else repr(value) for value in found]
            yield Mismatch(key, shown[0], shown[1])


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in VOLATILE_KEYS:
            yield f"{prefix}{key}", value


def _file_differences(one: Checkpoint, other: Checkpoint) -> Iterator[Mismatch]:
    """Tokenizer files beside the weights, and what they are in either model."""
    folders = (Path(one.folder), Path(other.folder))
    names: set[str] = set()
    for folder in folders:
        with suppress(OSError):
            names |= {e.name for e in folder.iterdir() if is_tokenizer_file(e.name) and e.is_file()}
    for name in sorted(names):
        sums: list[str | None] = []
        for folder in folders:
            try:
                sums.append(file_checksum(folder / name) if (folder / name).is_file() else None)
            except OSError as error:
                raise InputError(f"{folder / name} cannot be read: {error.strerror}") from error
        if sums[0] != sums[1]:
            yield Mismatch(name, *sums)


def run_comparison(
    plan: ComparisonPlan, moved: Callable[[int, str], None] = lambda count, name: None
) -> Comparison:
    """Reads both models.

    moved: is told of bytes that were read, and of the tensor; from the workers' threads.

    Raises:
        LazymergeError: a file cannot be read, or changes.
        DoesNotFitError: what is to be downloaded does not fit on the disk.
    """
    missing = missing_files(plan.checkpoints, "", ())
    if missing:
        download(missing, plan.checkpoints)
    began = time.perf_counter()
    stamps = stamps_of_models(plan.checkpoints)
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

    files = InputFiles(stamps)
    try:
        unequal = []
        for name in plan.integers:
            if not _same_integers(plan, name, files, read):
                unequal.append(name)
        _stream(plan, files, read, finished)
    finally:
        files.close()
    changed_since(stamps, plan.checkpoints)
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
        unequal_integers=tuple(unequal),
        seconds=time.perf_counter() - began,
        bytes_read=total,
        measured_bytes=peak_resident_bytes(),
    )


def _stream(
    plan: ComparisonPlan,
    files: InputFiles,
    read: Callable[[int, int, str], None],
    finished: Callable[[Write, Sequence[Any]], None],
) -> None:
    execution, memory = plan.resources.execution, plan.memory
    scheduler = Scheduler(
        plan.graph, plan.tasks, finished, execution.device, most_open=memory.workers
    )
    recent = Recent(8 * memory.workers)
    ahead = ReadAhead(plan.graph, plan.tasks, files, execution.device)
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
            )
            for _ in range(memory.workers)
        ]
        run_workers(scheduler, workers)
    store_baseline(memory.libraries)


def _same_integers(
    plan: ComparisonPlan,
    name: str,
    files: InputFiles,
    read: Callable[[int, int, str], None],
) -> bool:
    """Whether a tensor's bytes are the same in both models."""
    infos = [checkpoint.tensors[name] for checkpoint in plan.checkpoints]
    size = infos[0].size_bytes
    rooms = [memoryview(bytearray(min(size, COMPARED_BYTES))) for _ in infos]
    for done in range(0, size, COMPARED_BYTES):
        count = min(COMPARED_BYTES, size - done)
        for checkpoint, info, room in zip(plan.checkpoints, infos, rooms, strict=True):
            path = os.path.join(info.folder or checkpoint.folder, info.file)
            read_exactly(files.descriptor(path), room[:count], info.start + done, path)
        read(2 * count, 0, name)
        if rooms[0][:count] != rooms[1][:count]:
            return False
    return True
