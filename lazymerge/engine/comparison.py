"""How two models differ, tensor by tensor, in one pass over both under the memory limit.

    headers ─► what only one has, other shapes, other dtypes        (plan_comparison)
    Read a, Read b ─► Reduce merge_statistics, one for each tensor  (comparing.py)

A task of the engine ends with a tensor that is written; here that is an empty one, which takes no
pass, so that all there is to a task is its reduction. Integers are compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
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
from ..graph.operations.statistics import MergeStatistics
from ..graph.targets import natural_order
from ..output.checksum import file_checksum
from ..vocabulary.files import is_tokenizer_file
from .baseline import resident_bytes
from .byte_streams import ByteReading, Place, byte_reading
from .download import fetch_tokenizers
from .likeness import kinds_of
from .memory import (
    MemoryPlan,
    default_limit_bytes,
    default_workers,
    plan_memory,
)
from .models import aligned
from .needed_ranges import FetchNeeds, chunks_of, fetch_needs, path_of
from .remote_inputs import Distant, check_ranges, remote_inputs
from .resources import Resources
from .stages import TensorTask
from .statistics import TensorStatistics

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
    bytes_compared: reading these. remote: files that are not on the local disk, by path.
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
    bytes_compared: ByteReading
    remote: Mapping[str, Distant]

    @property
    def bytes_to_fetch(self) -> int:
        """Of files that are not on the local disk, each byte once."""
        nodes = (*self.graph, *self.bytes_compared.graph)
        reads = [n for n in nodes if isinstance(n, Read) and path_of(n) in self.remote]
        return sum(chunks.size_bytes for chunks in chunks_of(reads).values())

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
    fetch_tokenizers([one, other])
    remote = remote_inputs([one, other], streams=resources.streams)
    check_ranges(remote, resources.network)
    compared = byte_reading([places_of(models, name) for name in integers])
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
            fetches=_fetch_needs(graph, tasks, compared, remote) if remote else None,
        ),
        resources=resources,
        bytes_compared=compared,
        remote=remote,
    )


def places_of(models: tuple[Checkpoint, Checkpoint], name: str) -> list[Place]:
    """Where a tensor is in either model."""
    infos = [(model.folder, model.tensors[name]) for model in models]
    return [(info.folder or folder, info) for folder, info in infos]


def _fetch_needs(
    graph: Graph,
    tasks: Sequence[TensorTask],
    compared: ByteReading,
    remote: Mapping[str, Distant],
) -> FetchNeeds:
    """What must be held of inputs that lie elsewhere: integers are done with before the others
    begin."""
    both = (compared.needs(remote), fetch_needs(graph, tasks, remote, "cpu"))
    return FetchNeeds(
        max(needs.job_bytes for needs in both),
        max(needs.task_bytes for needs in both),
        sum(needs.total_bytes for needs in both),
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
    folders = (Path(one.local_folder), Path(other.local_folder))
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
