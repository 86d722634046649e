"""What a worker of a cluster is given, and what it gives back."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..engine.execution import Execution
from ..engine.needed_ranges import path_of, reads_of_task
from ..engine.plan import Plan
from ..engine.remote_inputs import Distant
from ..engine.splitting import work_bytes
from ..engine.stages import TensorTask
from ..engine.store.shards import Target
from ..engine.streaming import FinishedTensor, Stamps
from ..graph.graph import Graph
from ..output.layout import Placement, Shard
from ..output.store.records import ShardRecord

GROUPS_A_WORKER = 16
"""When all but one are done, the last takes a sixteenth of a worker's time, or 6%."""

MOST_GROUP_BYTES = 4 << 30
"""Read and written. What a worker that dies has done of a group is done again, and this takes a
quarter of a minute at 300 MB/s."""

LEAST_GROUP_BYTES = 256 << 20
"""Beside its work a group costs its worker 4 ms, and the time until the next one comes, 10 ms or
more (docs/performance.md, On a cluster); these bytes take 0.1 s of a processor, from disks more."""


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A whole shard, to be made in an object store."""

    target: Target
    shard: Shard


@dataclass(frozen=True, slots=True)
class Group:
    """Some tensors of one shard, and everything that is needed to make them.

    number: among the run's groups.
    token: names the run; the output shows it to who writes there.
    folder: of the output, absolute. file: the shard's final name. file_bytes: its length.
    placements: of the tensors, in the order of the file.
    graph, tasks: their work. work_bytes: what that reads and writes.
    execution: how it is to be done. forgets: as Work.
    stamps: what the input files must be.
    limit_bytes: bound of the process's memory; None: the worker's own. threads: as that.
    syncs: the bytes are on disk when the result is given back.
    strict: inf or nan is an error.
    versions: that the worker must have, by package.
    plugins: files with methods, absolute, and digests of their contents.
    stored: where the group's shard is made if not in a folder; then it is all of it.
    """

    number: int
    token: str
    folder: str
    file: str
    file_bytes: int
    placements: tuple[Placement, ...]
    graph: Graph
    tasks: tuple[TensorTask, ...]
    work_bytes: int
    execution: Execution
    forgets: bool
    stamps: Stamps
    remote_inputs: Mapping[str, Distant]
    limit_bytes: int | None
    threads: int | None
    syncs: bool
    strict: bool
    versions: Mapping[str, str]
    plugins: Sequence[tuple[str, str]] = ()
    stored: StoredShard | None = None


@dataclass(frozen=True, slots=True)
class GroupResult:
    """A group that is made.

    number: the group's. worker: address of who made it.
    tensors: in the order in which they were finished. notes: that a person should know.
    bytes_read: in all passes. bytes_fetched: over the network, of inputs.
    seconds: that it took. peak_bytes: the worker's peak resident set, and the most that
        the group had of fetched inputs and of uploads. projected_bytes: what the worker had
        planned that to be at most.
    record: of a shard in a store.
    """

    number: int
    worker: str
    tensors: tuple[FinishedTensor, ...]
    notes: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    bytes_fetched: int
    seconds: float
    peak_bytes: int
    projected_bytes: int
    record: ShardRecord | None = None


class _Call:
    """Becomes what a function makes of a group, when it is unpickled."""

    def __init__(self, function: Callable[[Group], GroupResult], group: Group) -> None:
        self._function = function
        self._group = group

    def __reduce__(self) -> tuple[Callable[[Group], GroupResult], tuple[Group]]:
        return self._function, (self._group,)


def packed_call(function: Callable[[Group], GroupResult], group: Group) -> bytes:
    """A call of a function, made by whoever unpickles this.

    What Dask is to call is then pickle.loads, with bytes: its scheduler takes apart what it is
    given and puts it together again, which took it 8.8 ms for a group of 67 tensors (with bytes
    3.4), and for which it would have to have lazymerge.
    """
    return pickle.dumps(_Call(function, group))


@dataclass(frozen=True, slots=True)
class Terms:
    """What all groups of a run have in common; as in Group.

    target: the store that shards are made in, each by one worker; None: they are in `folder`.
    """

    token: str
    folder: str
    limit_bytes: int | None
    threads: int | None
    syncs: bool
    strict: bool
    forgets: bool
    versions: Mapping[str, str]
    plugins: Sequence[tuple[str, str]] = ()
    target: Target | None = None


@dataclass(slots=True)
class _Open:
    """A group that is being put together."""

    shard: Shard
    tasks: list[TensorTask] = field(default_factory=list)
    work_bytes: int = 0


class Division:
    """A plan's missing tensors, in groups. They are put together when they are asked for: of
    hundreds of thousands of operations only those of a few groups exist twice."""

    def __init__(
        self,
        plan: Plan,
        tasks: Sequence[TensorTask],
        workers: int,
        stamps: Stamps,
        terms: Terms,
    ) -> None:
        """tasks: of the tensors that are missing. workers: how many there are now."""
        self._plan = plan
        self._terms = terms
        self._stamps = _checkable(plan, stamps)
        self._placements = {t.name: t for shard in plan.shards for t in shard.tensors}
        self._groups = (
            _divided(plan, tasks, workers) if terms.target is None else _whole(plan, tasks)
        )

    def __len__(self) -> int:
        return len(self._groups)

    def work_bytes(self, number: int) -> int:
        """What a group reads and writes."""
        return self._groups[number].work_bytes

    def names(self, number: int) -> list[str]:
        """A group's tensors."""
        return [task.write.name for task in self._groups[number].tasks]

    def group(self, number: int) -> Group:
        """One of them, complete."""
        chosen = self._groups[number]
        plan, terms = self._plan, self._terms
        graph = plan.graph.reached_from([task.write.id for task in chosen.tasks])
        paths = {path_of(read) for task in chosen.tasks for read in reads_of_task(graph, task)}
        return Group(
            number=number,
            token=terms.token,
            folder=terms.folder,
            file=chosen.shard.file,
            file_bytes=chosen.shard.size_bytes,
            placements=tuple(self._placements[task.write.name] for task in chosen.tasks),
            graph=graph,
            tasks=tuple(chosen.tasks),
            work_bytes=chosen.work_bytes,
            execution=plan.execution,
            forgets=terms.forgets,
            stamps={path: self._stamps[path] for path in paths if path in self._stamps},
            remote_inputs={p: plan.remote_inputs[p] for p in paths if p in plan.remote_inputs},
            limit_bytes=terms.limit_bytes,
            threads=terms.threads,
            syncs=terms.syncs,
            strict=terms.strict,
            versions=terms.versions,
            plugins=terms.plugins,
            stored=None if terms.target is None else StoredShard(terms.target, chosen.shard),
        )


def _checkable(plan: Plan, stamps: Stamps) -> Stamps:
    """Stamps of the files that are the same on every machine: those of the Hub's cache are named by
    their commit, and each machine has fetched them at a time of its own."""
    fetched = {
        f"{folder}/{file.path}"
        for checkpoint in plan.checkpoints.values()
        for folder, files in checkpoint.files_by_folder
        for file in files
        if file.modified_ns is None
    }
    return {path: stamp for path, stamp in stamps.items() if path not in fetched}


def _divided(plan: Plan, tasks: Sequence[TensorTask], workers: int) -> list[_Open]:
    """The tasks in groups, each of neighbours in one shard; those far larger than others first, for
    they would be waited for at the end."""
    works = work_bytes(plan, tasks)
    total = sum(works.values())
    wanted = total // (max(1, workers) * GROUPS_A_WORKER)
    most = min(MOST_GROUP_BYTES, max(LEAST_GROUP_BYTES, wanted))
    by_name = {task.write.name: task for task in tasks}
    groups: list[_Open] = []
    for shard in plan.shards:
        missing = [by_name[t.name] for t in shard.tensors if t.name in by_name]
        groups += _cut(shard, missing, works, most)
    return sorted(groups, key=lambda group: group.work_bytes <= 2 * most)


def _whole(plan: Plan, tasks: Sequence[TensorTask]) -> list[_Open]:
    """A group for every shard, whose tensors are all missing; the largest first."""
    works = work_bytes(plan, tasks)
    by_name = {task.write.name: task for task in tasks}
    groups = []
    for shard in plan.shards:
        own = [by_name[tensor.name] for tensor in shard.tensors if tensor.name in by_name]
        if own:
            groups.append(_Open(shard, own, sum(works[task.write.name] for task in own)))
    return sorted(groups, key=lambda group: -group.work_bytes)


def _cut(
    shard: Shard, tasks: Sequence[TensorTask], works: Mapping[str, int], most: int
) -> Iterator[_Open]:
    group = _Open(shard)
    for task in tasks:
        work = works[task.write.name]
        if group.tasks and group.work_bytes + work > most:
            yield group
            group = _Open(shard)
        group.tasks.append(task)
        group.work_bytes += work
    if group.tasks:
        yield group
