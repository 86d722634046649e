"""What a worker of a cluster does with a group: the engine's stream, into the output's own shard.

The worker writes the group's ranges of the shard in place, or uploads the shard, and nothing else.
Two workers that were given the same group write the same bytes, so neither needs to know of the
other; one that was believed dead and comes back does no harm either, as long as it writes where it
was meant to. So it looks for the run's sign (destination.py) once the shard is open: if it is
there, the folder is the one that the run writes, seen through whatever filesystem; and a shard that
a later run makes is another file. It looks again every second: a worker that comes back when the
run is over stops.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..engine.baseline import peak_resident_bytes, resident_bytes
from ..engine.complete import NonfiniteError
from ..engine.device.interface import Device
from ..engine.execution import default_kernels
from ..engine.likeness import kinds_of
from ..engine.memory import (
    MemoryPlan,
    available_memory_bytes,
    default_limit_bytes,
    default_workers,
    plan_memory,
)
from ..engine.needs import needs_of_remote
from ..engine.plan import torch_version
from ..engine.store.memory import StoreNeeds, held_beside_client, store_needs
from ..engine.store.shards import store_shard
from ..engine.streaming import Conditions, FinishedTensor, Work, stream
from ..errors import DoesNotFitError, InputError, LazymergeError
from ..methods.plugins import installed_versions, load_installed, load_plugin, plugin_digest
from ..output.store.records import ShardRecord
from ..version import __version__
from .destination import FolderSign, RangeWriter, Sign, StoreSign
from .group import Group, GroupResult

MOST_SHARE = 0.8
"""Of the limit that a Dask worker has for itself, whatever --memory says: beyond, it takes no more
work."""

USED_SHARE = 0.6
"""Of the limit that a Dask worker has for itself: from there on it takes measures (it moves results
to disk, stops taking tasks at 0.8, is killed at 0.95). Source: Dask, worker memory management."""

TOLD_SECONDS = 1.0
"""How often a worker says how far a group is."""

TOPIC = "lazymerge"
"""Of the events in which it says so."""

_KINDS = {kind.exit_code: kind for kind in (LazymergeError, InputError, DoesNotFitError)}
"""What errors are told as: those derived from them may not survive the way back."""

_one_at_a_time = threading.Lock()
"""A group has all threads of a worker and all the memory that it may take."""


def make_group(group: Group) -> GroupResult:
    """Makes a group's tensors.

    Raises:
        LazymergeError: reading or writing fails; the message names this machine.
    """
    began = time.perf_counter()
    try:
        _check_versions(group.versions)
        _load_plugins(group)
        with _one_at_a_time:
            told = _make(group)
    except NonfiniteError:
        raise
    except LazymergeError as error:
        raise _KINDS[error.exit_code](f"{socket.gethostname()}: {error}") from None
    return GroupResult(
        number=group.number,
        worker=_dask_worker_address(),
        tensors=tuple(told.tensors),
        notes=tuple(told.notes),
        record=told.record,
        bytes_read=told.bytes_read,
        bytes_written=told.bytes_written,
        bytes_fetched=told.bytes_fetched,
        seconds=time.perf_counter() - began,
        peak_bytes=peak_resident_bytes() + told.held_bytes,
        projected_bytes=told.projected_bytes,
    )


def _make(group: Group) -> _Told:
    told = _Told(group)
    if group.execution.device == "cuda":
        from ..engine.device.cuda import CudaDevice

        with closing(CudaDevice()) as device:
            _make_with(group, told, device)
    else:
        _make_with(group, told, None)
    return told


def _make_with(group: Group, told: _Told, device: Device | None) -> None:
    """device: that computes, if one does."""
    conditions = Conditions(group.stamps, told.tell, group.strict)
    if group.stored is not None:
        told.sign.check()
    work = _work(group, device)
    told.projected_bytes = work.memory.projected_bytes
    if group.stored is not None:
        told.record, told.held_bytes = store_shard(
            work,
            group.stored.shard,
            group.stored.target,
            told,
            conditions,
            device=device,
        )
        return
    folder = Path(group.folder)
    writer = RangeWriter(folder, group.file, group.file_bytes, group.placements, group.token)
    try:
        told.held_bytes = stream(
            work,
            writer,
            told,
            conditions,
            where=group.folder,
            device=device,
        )
        if group.syncs:
            writer.sync()
    finally:
        writer.close()


def _work(group: Group, device: Device | None) -> Work:
    execution = group.execution
    if execution.device == "cpu":
        execution = replace(execution, kernels=default_kernels())
    return Work(
        graph=group.graph,
        tasks=group.tasks,
        execution=execution,
        memory=_memory(group, device),
        remote_inputs=group.remote_inputs,
        forgets=group.forgets,
    )


def _memory(group: Group, device: Device | None) -> MemoryPlan:
    """As a run of this group alone would be planned in this process.

    Raises:
        DoesNotFitError: it does not fit into the worker's memory.
    """
    limit = _limit_bytes(group.limit_bytes, _dask_limit_bytes())
    needs = needs_of_remote(group.graph, group.tasks, group.remote_inputs, group.execution)
    kinds = kinds_of(group.graph, group.tasks)
    memory = plan_memory(
        group.graph,
        kinds,
        min(limit, resident_bytes() + available_memory_bytes()),
        group.threads or _dask_threads() or default_workers(),
        group.execution,
        held_bytes=held_beside_client(resident_bytes()) if group.stored else resident_bytes(),
        fetches=needs,
        store=_store_needs(group),
    )
    if device is None:
        return memory
    from ..engine.device.memory import memory_on_device

    return memory_on_device(group.graph, kinds, memory, group.execution, device)


def _store_needs(group: Group) -> StoreNeeds | None:
    if group.stored is None:
        return None
    return store_needs(group.graph, [group.stored.shard], group.execution.device)


class _Told:
    """Keeps what is done of a group, and tells the run every now and then."""

    def __init__(self, group: Group) -> None:
        self._number = group.number
        self._token = group.token
        self.sign: Sign = (
            FolderSign(Path(group.folder), group.token)
            if group.stored is None
            else StoreSign(group.stored.target.address, group.token)
        )
        self.record: ShardRecord | None = None
        self._lock = threading.Lock()
        self._next = time.monotonic() + TOLD_SECONDS
        self._say = _dask_events()
        self._worker = _dask_worker_address()
        self._tensor = ""
        self.tensors: list[FinishedTensor] = []
        self.notes: list[str] = []
        self.bytes_read = self.bytes_written = self.bytes_fetched = 0
        self.held_bytes = self.projected_bytes = 0

    def began(self, tensor: str) -> None:
        self._tensor = tensor

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        with self._lock:
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written

    def fetched(self, size_bytes: int) -> None:
        with self._lock:
            self.bytes_fetched += size_bytes

    def finished(self, tensor: FinishedTensor) -> None:
        with self._lock:
            self.tensors.append(tensor)

    def noted(self, message: str) -> None:
        self.notes.append(message)

    def tell(self) -> None:
        """Says how far the group is, if it is time to; from the thread that waits for others.

        Raises:
            LazymergeError: nobody waits for the group any more.
        """
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + TOLD_SECONDS
            self.sign.check()
            self._say(
                {
                    "token": self._token,
                    "group": self._number,
                    "worker": self._worker,
                    "tensor": self._tensor,
                    "read": self.bytes_read,
                    "written": self.bytes_written,
                    "fetched": self.bytes_fetched,
                }
            )


def versions_here() -> dict[str, str]:
    """Of the packages that decide the output's bytes, those with merge methods among them: of
    lazymerge's code that runs, not of what was installed once."""
    return {**installed_versions(), "lazymerge": __version__, "torch": torch_version()}


def _check_versions(wanted: Mapping[str, str]) -> None:
    """Raises:
    InputError: a package is not the one that the run was planned with.
    """
    here = versions_here()
    for package, planned in wanted.items():
        if here.get(package) != planned:
            raise InputError(
                f"{package} is {here.get(package, 'not there')} here, and {planned} where the run "
                "was planned: the output's bytes depend on it. Install the same on all machines"
            )


def _load_plugins(group: Group) -> None:
    """Raises:
    InputError: a plugin is not there, or not the same.
    """
    load_installed()
    for path, digest in group.plugins:
        if Path(path).is_file() and plugin_digest(Path(path)) != digest:
            raise InputError(f"plugin {path} is another file here than where the run was planned")
        load_plugin(path)


def _dask_worker() -> Any:
    """The Dask worker that this thread belongs to; None where there is none."""
    from distributed import get_worker

    try:
        return get_worker()
    except ValueError:
        return None


def _dask_worker_address() -> str:
    worker = _dask_worker()
    return "" if worker is None else str(worker.address)


def _limit_bytes(asked: int | None, of_worker: int | None) -> int:
    """Of the process's memory. asked: by --memory. of_worker: what Dask grants it."""
    if of_worker is None:
        return asked or default_limit_bytes()
    return int(of_worker * USED_SHARE) if asked is None else min(asked, int(of_worker * MOST_SHARE))


def _dask_limit_bytes() -> int | None:
    worker = _dask_worker()
    return None if worker is None else worker.memory_manager.memory_limit


def _dask_threads() -> int | None:
    worker = _dask_worker()
    return None if worker is None else int(worker.state.nthreads)


def _dask_events() -> Callable[[dict[str, Any]], None]:
    worker = _dask_worker()
    if worker is None:
        return lambda event: None

    def say(event: dict[str, Any]) -> None:
        worker.log_event(TOPIC, event)

    return say
