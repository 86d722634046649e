"""What a worker of a cluster does with a group: the engine's stream, into the output's own shard.

The worker writes the group's ranges of the shard in place, and nothing else. Two workers that were
given the same group write the same bytes, so neither needs to know of the other; one that was
believed dead and comes back does no harm either, as long as it writes where it was meant to:

    OUT/.lazymerge/cluster-TOKEN     is there while the run goes on that gave the group away

It is looked for after the shard has been opened. Is it there, the folder is the one that the run
writes, seen through whatever filesystem; and a shard that a later run makes is another file. It is
looked for every second from then on: a worker that comes back when the run is over stops.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from hashlib import blake2b
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
from ..engine.plan import needs_of_remote, torch_version
from ..engine.streaming import FinishedTensor, Work, stream
from ..errors import DoesNotFitError, InputError, LazymergeError
from ..methods.plugins import load_installed, load_plugin
from ..output.folder import OWN_FOLDER
from ..output.writer import PARTIAL_SUFFIX, open_own, write_error
from ..version import __version__
from .group import Group, GroupResult

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


def token_path(folder: Path, token: str) -> Path:
    """What is there while a run gives groups away."""
    return folder / OWN_FOLDER / f"cluster-{token}"


def make_packed_group(packed: bytes) -> GroupResult:
    """As make_group, of its pickle; called by Dask, in a worker."""
    group: Group = pickle.loads(packed)
    return make_group(group)


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
        bytes_read=told.bytes_read,
        bytes_written=told.bytes_written,
        bytes_fetched=told.bytes_fetched,
        seconds=time.perf_counter() - began,
        peak_bytes=peak_resident_bytes(),
    )


def _make(group: Group) -> _Told:
    writer = RangeWriter(group)
    told = _Told(group)
    try:
        if group.execution.device == "cuda":
            from ..engine.device.cuda import CudaDevice

            with closing(CudaDevice()) as device:
                _stream(group, writer, told, device)
        else:
            _stream(group, writer, told, None)
        if group.syncs:
            writer.sync()
    finally:
        writer.close()
    return told


def _stream(group: Group, writer: RangeWriter, told: _Told, device: Device | None) -> None:
    execution = group.execution
    if execution.device == "cpu":
        execution = replace(execution, kernels=default_kernels())
    work = Work(
        graph=group.graph,
        tasks=group.tasks,
        execution=execution,
        memory=_memory(group, device),
        remote_inputs=group.remote_inputs,
        forgets=group.forgets,
    )
    stream(
        work,
        writer,
        group.stamps,
        told,
        where=Path(group.folder),
        device=device,
        strict=group.strict,
        check=told.tell,
    )


def _memory(group: Group, device: Device | None) -> MemoryPlan:
    """As a run of this group alone would be planned in this process.

    Raises:
        DoesNotFitError: it does not fit into the worker's memory.
    """
    limit = group.limit_bytes or _dask_limit_bytes() or default_limit_bytes()
    needs = needs_of_remote(group.graph, group.tasks, group.remote_inputs, group.execution)
    kinds = kinds_of(group.graph, group.tasks)
    memory = plan_memory(
        group.graph,
        kinds,
        min(limit, resident_bytes() + available_memory_bytes()),
        group.threads or _dask_threads() or default_workers(),
        group.execution,
        held_bytes=resident_bytes(),
        fetches=needs,
    )
    if device is None:
        return memory
    from ..engine.device.memory import memory_on_device

    return memory_on_device(group.graph, kinds, memory, group.execution, device)


class RangeWriter:
    """Writes tensors of one shard that somebody else has made and will rename. Opened for writing
    alone: a network filesystem that also reads may hold pages, and write back what lies beside the
    bytes that were written."""

    def __init__(self, group: Group) -> None:
        """Raises:
        LazymergeError: the shard is not there, or not the one that is meant.
        """
        folder = Path(group.folder)
        self._path = folder / (group.file + PARTIAL_SUFFIX)
        self._starts = {tensor.name: tensor.start for tensor in group.placements}
        self._descriptor = -1
        try:
            self._descriptor = open_own(self._path, os.O_WRONLY)
            size_bytes = os.fstat(self._descriptor).st_size
        except FileNotFoundError:
            raise LazymergeError(
                f"{self._path} is not there: the output must be on a filesystem that all workers "
                "share, at the same path; or give an object store, -o s3://bucket/prefix"
            ) from None
        except OSError as error:
            raise write_error(self._path, error) from error
        if size_bytes != group.file_bytes or not token_path(folder, group.token).exists():
            self.close()
            raise LazymergeError(
                f"{self._path} is not the file that the run writes: this machine has another "
                "folder under that name, or the run has ended"
            )

    def write(self, tensor: str, data: memoryview, offset: int) -> None:
        start = self._starts[tensor] + offset
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], start + done)
        except OSError as error:
            raise self.failure(tensor, error, len(data) - done) from error

    def place(self, tensor: str) -> tuple[int, int]:
        return self._descriptor, self._starts[tensor]

    def failure(self, tensor: str, error: OSError, size_bytes: int) -> LazymergeError:
        return write_error(self._path, error, size_bytes)

    def sync(self) -> None:
        """Waits until what was written is where a power failure of this machine does not reach it.

        Raises:
            LazymergeError: nobody can say that it is.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self._path, error) from error

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class _Told:
    """Keeps what is done of a group, and tells the run every now and then."""

    def __init__(self, group: Group) -> None:
        self._number = group.number
        self._token = group.token
        self._token_path = token_path(Path(group.folder), group.token)
        self._lock = threading.Lock()
        self._next = time.monotonic() + TOLD_SECONDS
        self._say = _dask_events()
        self._worker = _dask_worker_address()
        self._tensor = ""
        self.tensors: list[FinishedTensor] = []
        self.notes: list[str] = []
        self.bytes_read = self.bytes_written = self.bytes_fetched = 0

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
            self._check_run()
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

    def _check_run(self) -> None:
        """Raises:
        LazymergeError: the run has ended, or another goes on with the output: it would wait for
            this worker, and whoever has the complete output may be about to change the inputs.
        """
        try:
            self._token_path.stat()
        except FileNotFoundError:
            raise LazymergeError(f"{self._token_path} is gone: the run has ended") from None
        except OSError:
            pass  # a filesystem that is not there for a moment


def versions_here() -> dict[str, str]:
    """Of the packages that decide the output's bytes: of the code that runs, not of what was
    installed once."""
    return {"lazymerge": __version__, "torch": torch_version()}


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


def plugin_digest(path: Path) -> str:
    """Of a plugin's text."""
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()


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


def _dask_limit_bytes() -> int | None:
    worker = _dask_worker()
    limit = None if worker is None else worker.memory_manager.memory_limit
    return int(limit * USED_SHARE) if limit else None


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
