"""Running a plan: prepare the output, or what is there of it, let the workers stream, finish.

    lock ► recover ► create missing shards ► workers ─► journal ─► rename shards ► small files
         ► manifest ► remove .lazymerge

A run may end at any point, in any way, and another one goes on from there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint import Checkpoint
from ..checkpoint.folder import SUFFIX
from ..checkpoint.hub import Moved
from ..errors import InputAtFaultError, InputError, LazymergeError
from ..graph.node import Read
from ..output.folder import clear_output_folder
from ..output.lock import OutputLock
from ..output.manifest import MANIFEST_NAME, STATISTICS_NAME, write_document
from ..output.writer import ShardWriter, sync_folder, write_error
from .baseline import peak_resident_bytes, resident_bytes, store_baseline
from .complete import (
    bring_up_to_date,
    check_complete,
    complete_document,
    nonfinite_error,
    remove_beginnings,
    stale_files,
    tell_edited,
    tidy_up,
)
from .device.interface import Device
from .device.memory import fit_to_device
from .download import download
from .finishing import manifest, write_beside_weights
from .inputs import ChangedInputError, changed_error
from .memory import available_memory_bytes
from .nonfinite import examine
from .plan import Plan
from .preparing import Prepared, check_output, prepare
from .report import Observer, RunReport, Silent
from .stages import TensorTask
from .statistics_file import write_statistics
from .streaming import AbandonedError, FinishedTensor, Stamps, Told, stream, work_of
from .timeline import Timeline
from .unfinished import was_begun_with_statistics


def run_plan(
    plan: Plan,
    output: Path | str,
    *,
    overwrite: bool = False,
    fsync: bool = True,
    observer: Observer | None = None,
    device: Device | None = None,
    strict: bool = False,
    recheck: bool = False,
    hash_inputs: bool = False,
    workforce: Workforce | None = None,
) -> RunReport:
    """Runs a plan into a folder, or goes on with what an earlier run of the same plan has left.

    overwrite: replace what an earlier merge has left in the folder.
    fsync: wait until the data is on disk before giving files their final names.
    strict: inf or nan in the output is an error.
    device: the accelerator, for plans that are made for one; by default a GPU is looked for.
    recheck: read what an earlier run has written before believing it.
    hash_inputs: read all inputs once before, so that any change of them is noticed.
    workforce: who makes the tensors; by default the threads of this process.

    Raises:
        InputError: an input has changed since it was planned, the folder cannot be used, holds
            something else or is being written by another process, integer tensors differ between
            models, or there is no such device as planned for.
        DoesNotFitError: the disk is full, or this process already holds so much that the merge
            does not fit beside it.
        LazymergeError: reading or writing fails.
        KeyboardInterrupt: interrupted.

    Whatever it raises, tensors that are complete stay, for another run to go on with; if there are
    none, or an input is at fault, the files it has made are removed.
    """
    if plan.execution.device == "cpu" and device is not None:
        raise ValueError("this merge is planned for the processor")
    is_elsewhere = workforce is not None and workforce.is_elsewhere
    if plan.execution.device == "cuda" and device is None and not is_elsewhere:
        from .device.cuda import CudaDevice

        with closing(CudaDevice()) as found:
            return run_plan(
                plan,
                output,
                overwrite=overwrite,
                fsync=fsync,
                observer=observer,
                device=found,
                strict=strict,
                recheck=recheck,
                hash_inputs=hash_inputs,
                workforce=workforce,
            )
    folder = Path(output)
    prepare_inputs(plan, folder, overwrite=overwrite)
    if not is_elsewhere:
        plan = plan.in_this_process(resident_bytes())
    if device is not None:
        plan = fit_to_device(plan, device)
    observer = observer or Silent()
    document = None if overwrite else complete_document(plan, folder)
    if document is None:
        check_output(plan, folder, overwrite=overwrite)
    else:
        check_complete(plan, document, observer, strict=strict, hash_inputs=hash_inputs)
        stale = stale_files(plan, document, folder)
        if not stale.asks_for_work:
            tell_edited(stale, observer)
            tidy_up(folder, plan)
            return _nothing_to_do(plan, folder, observer)
    with _locked(folder, observer) as (lock, made):
        # once more, now that nobody else writes
        document = None if overwrite else complete_document(plan, folder)
        if document is not None:
            check_complete(plan, document, observer, strict=strict, hash_inputs=False)
            bring_up_to_date(plan, document, folder, observer, fsync=fsync)
            remove_beginnings(folder)
            return _nothing_to_do(plan, folder, observer)
        resumes = check_output(plan, folder, overwrite=overwrite)
        if resumes and was_begun_with_statistics(folder):
            plan = plan.with_statistics()
            if not is_elsewhere:
                plan = plan.in_this_process(resident_bytes())
        prepared = prepare(
            plan,
            folder,
            resumes=resumes,
            overwrite=overwrite,
            fsync=fsync,
            observer=observer,
            recheck=recheck,
            hash_inputs=hash_inputs,
            made=made,
        )
        with _closed_at_the_end(prepared, folder, lock):
            return _run(
                plan,
                folder,
                prepared,
                lock,
                workforce or ThisProcess(device),
                fsync=fsync,
                observer=observer,
                device=device,
                strict=strict,
            )


@contextmanager
def _locked(folder: Path, observer: Observer) -> Iterator[tuple[OutputLock, Sequence[Path]]]:
    """The output's lock, and the folders that were made for it. Those are removed if they hold
    nothing when the block fails."""
    made = [f for f in (folder.absolute(), *folder.absolute().parents) if not f.exists()]
    lock = None
    try:
        lock = OutputLock(folder)
        if lock.taken_over is not None:
            observer.noted(f"{lock.taken_over} was writing {folder} and ended before it was done")
        yield lock, made
    except AbandonedError:
        raise  # what a worker may be writing to stays open, and locked, until it has ended
    except BaseException:
        if lock is not None:
            lock.release()
        with suppress(OSError):  # what holds anything stays
            for made_folder in made:
                made_folder.rmdir()
        raise
    lock.release()


@contextmanager
def _closed_at_the_end(prepared: Prepared, folder: Path, lock: OutputLock) -> Iterator[None]:
    """Closes an output's files. If the block fails and nobody could go on with what is there, they
    are removed."""
    try:
        yield
    except AbandonedError as error:
        _close_later(error, prepared, lock)
        raise
    except BaseException as error:
        if isinstance(error, ChangedInputError) and not lock.is_lost:
            _disown(prepared)
        prepared.writer.close()
        prepared.journal.close()
        lock.touch()  # what is there may be another's by now
        if _is_to_be_removed(prepared, error) and not lock.is_lost:
            with suppress(OSError):  # what went wrong first is what is to be said
                prepared.writer.discard()
                clear_output_folder(folder)
        raise


def _disown(prepared: Prepared) -> None:
    """Says that what this run has finished is not there: it may be of an input that was another
    file meanwhile, and when that is put back as it was, the next run would believe it."""
    with suppress(LazymergeError):  # what went wrong first is what is to be said
        for name in prepared.checksums:
            prepared.journal.lost(name)


def _close_later(error: AbandonedError, prepared: Prepared, lock: OutputLock) -> None:
    """Closes an output and its inputs when the workers have ended, if the process lives to see
    that. The numbers of closed files are given to others, and a worker would read those."""

    def wait_and_close() -> None:
        for ended in error.running:
            ended.wait()
        error.close_inputs()
        prepared.writer.close()
        prepared.journal.close()
        lock.release()

    threading.Thread(target=wait_and_close, name="closing", daemon=True).start()


def _is_to_be_removed(prepared: Prepared, error: BaseException) -> bool:
    """Whether nobody could go on with what a run leaves: nothing is done; or an input is at fault,
    and when that has been put right it is another merge. Other mistakes (certificates, versions of
    a cluster's workers, credentials that have expired) leave the merge what it is."""
    is_anything_done = prepared.recovery.finished or prepared.checksums
    return isinstance(error, InputAtFaultError) or not is_anything_done


def _nothing_to_do(plan: Plan, folder: Path, observer: Observer) -> RunReport:
    observer.noted(
        f"{folder} holds this merge, complete; lazymerge verify reads it again, --overwrite makes "
        "it again"
    )
    if plan.execution.gathers and not (folder / STATISTICS_NAME).is_file():
        observer.noted("it was made without --stats; --overwrite makes it again with statistics")
    return RunReport(
        output=str(folder.absolute()),
        seconds=0.0,
        bytes_read=0,
        bytes_written=0,
        measured_bytes=peak_resident_bytes(),
        resumed_tensors=len(plan.tensors),
    )


CACHED_SHARE = 0.5
"""Of the memory that is available: what a merge may leave in the page cache, inputs and output."""


def outgrows_cache(plan: Plan) -> bool:
    """Whether inputs and output are too large to stay in the page cache together.

    What has been merged is then let out of it as the run goes on. The system would do so itself,
    but late, page by page, and while workers wait: two 3B models of 13.7 GB and their merge on a
    machine with 24 GB took 9.0 to 12.4 s from first block to last, and 2.2 to 2.6 s in this way.
    Smaller ones stay: the next merge may want them.
    """
    inputs = {
        (node.folder, node.tensor.file, node.tensor.start): node.tensor.size_bytes
        for node in plan.graph
        if isinstance(node, Read)
    }
    moved = sum(inputs.values()) + plan.bytes_written
    return moved > CACHED_SHARE * available_memory_bytes()


def prepare_inputs(
    plan: Plan, output: Path, *, overwrite: bool, moved: Moved | None = None
) -> None:
    """Has the inputs on the local disk, and checks that they are what was planned.

    Nothing is downloaded for an output that is complete or cannot be written.

    moved: is told of downloaded bytes; None: the library shows its own progress.

    Raises:
        InputError: an input is not what was planned, or the output cannot be written.
        DoesNotFitError: what is to be downloaded does not fit on the disk.
        LazymergeError: the download fails.
    """
    missing = plan.missing_files
    if missing:
        if not overwrite and complete_document(plan, output) is not None:
            return
        check_output(plan, output, overwrite=overwrite)
        download(missing, plan.checkpoints.values(), moved)
    check_inputs(plan)


def stamps_of(plan: Plan) -> Stamps:
    """Those of all input files now.

    Raises:
        LazymergeError: one is not there any more.
    """
    return stamps_of_models(plan.checkpoints.values(), plan.remote_inputs)


def stamps_of_models(checkpoints: Iterable[Checkpoint], but: Container[str] = ()) -> Stamps:
    """Those of all files of some models now. but: paths of files that are not on the local disk.

    Raises:
        LazymergeError: one is not there any more.
    """
    stamps = {}
    for checkpoint in checkpoints:
        for folder, files in checkpoint.files_by_folder:
            for file in files:
                path = os.path.join(folder, file.path)
                if path in but:
                    continue
                try:
                    status = os.stat(path)
                except OSError as error:
                    raise LazymergeError(f"{path} cannot be read: {error.strerror}") from error
                stamps[path] = (status.st_size, status.st_mtime_ns)
    return stamps


def check_unchanged(before: Stamps, plan: Plan) -> None:
    """Checks that no input was written to while it was merged.

    Raises:
        LazymergeError: one was.
    """
    changed_since(before, plan.checkpoints.values(), plan.remote_inputs)
    for remote in plan.remote_inputs.values():
        remote.check()


def changed_since(
    before: Stamps, checkpoints: Iterable[Checkpoint], but: Container[str] = ()
) -> None:
    """Checks that no file of some models was written to. but: as of stamps_of_models.

    Raises:
        LazymergeError: one was.
    """
    now = stamps_of_models(checkpoints, but)
    for path, stamp in before.items():
        if now[path] != stamp:
            raise changed_error(path)


def check_inputs(plan: Plan) -> None:
    """Checks that the inputs are the files that were planned, and has the safetensors library
    check the headers of its files once more by its own rules.

    Raises:
        InputError: one is not.
    """
    from safetensors import SafetensorError, safe_open

    for checkpoint in plan.checkpoints.values():
        for folder, file in (
            (folder, file) for folder, files in checkpoint.files_by_folder for file in files
        ):
            if os.path.join(folder, file.path) in plan.remote_inputs:
                continue  # its pin is looked at with every request
            path = Path(folder) / file.path
            try:
                status = path.stat()
                if path.suffix == SUFFIX:
                    with safe_open(path, framework="np"):
                        pass
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path} cannot be read: {error}") from error
            modified_ns = None if file.modified_ns is None else status.st_mtime_ns
            if (status.st_size, modified_ns) != (file.size_bytes, file.modified_ns):
                raise InputError(f"{path} has changed since the merge was planned; plan it again")


@dataclass(frozen=True, slots=True)
class Taken:
    """What making an output's tensors has taken.

    held_bytes: the most of fetched inputs that this process held at a time.
    elsewhere_bytes: the largest peak resident set of the other processes that did it; None: this
        one did.
    facts: for the manifest.
    """

    held_bytes: int = 0
    elsewhere_bytes: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Account(Told, Protocol):
    """Is told what is done of an output, and may be told that it is not."""

    def lost(self, tensor: str) -> None:
        """A finished tensor is not what it should be: it is to be made again."""


class Workforce(Protocol):
    """Makes the tensors that an output lacks."""

    is_elsewhere: bool
    """Whether that is done by other processes, which have limits of memory of their own."""

    def make(
        self,
        plan: Plan,
        tasks: Sequence[TensorTask],
        writer: ShardWriter,
        account: Account,
        *,
        stamps: Stamps,
        folder: Path,
        check: Callable[[], None],
        fsync: bool,
        strict: bool,
    ) -> Taken:
        """As `stream`, of which the other parameters are.

        writer: has the shards open. fsync: bytes are on disk before they are told of, where another
            machine has written them.
        """


class ThisProcess:
    """The threads of this process."""

    is_elsewhere = False

    def __init__(self, device: Device | None = None) -> None:
        """device: the accelerator, where one computes."""
        self._device = device

    def make(
        self,
        plan: Plan,
        tasks: Sequence[TensorTask],
        writer: ShardWriter,
        account: Account,
        *,
        stamps: Stamps,
        folder: Path,
        check: Callable[[], None],
        fsync: bool,
        strict: bool,
    ) -> Taken:
        held_bytes = stream(
            work_of(plan, tasks, forgets=outgrows_cache(plan)),
            writer,
            stamps,
            account,
            where=folder,
            check=check,
            device=self._device,
            strict=strict,
        )
        return Taken(held_bytes)


class _Progress:
    """Keeps account of what is done of an output."""

    def __init__(self, plan: Plan, prepared: Prepared, observer: Observer) -> None:
        self._prepared = prepared
        self._observer = observer
        self._lock = threading.Lock()
        self._places = {
            tensor.name: (shard.file, (tensor.start, tensor.stop_exclusive))
            for shard in plan.shards
            for tensor in shard.tensors
        }
        before = prepared.recovery.finished.items()
        self.nonfinite = {name: None for name, record in before if record.is_nonfinite}
        self.bytes_read = self.bytes_written = self.bytes_fetched = 0
        self.timeline = Timeline()
        self.timeline.note(0, 0)

    def began(self, tensor: str) -> None:
        self._observer.began(tensor)

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        with self._lock:
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written
            self.timeline.note(self.bytes_read, self.bytes_written)
        self._observer.moved(bytes_read, bytes_written, tensor)

    def fetched(self, size_bytes: int) -> None:
        with self._lock:
            self.bytes_fetched += size_bytes
        self._observer.fetched(size_bytes)

    def finished(self, tensor: FinishedTensor) -> None:
        prepared, name = self._prepared, tensor.name
        file, place = self._places[name]
        prepared.journal.finished(
            name,
            file,
            place,
            tensor.checksum,
            is_nonfinite=tensor.is_nonfinite,
            identity=prepared.writer.identity(name),
            statistics=tensor.statistics,
        )
        with self._lock:
            prepared.checksums[name] = tensor.checksum
            if tensor.statistics:
                prepared.statistics[name] = tensor.statistics
            if tensor.is_nonfinite:
                self.nonfinite[name] = None
        prepared.writer.finish_tensor(name)
        self._observer.finished(name)

    def lost(self, tensor: str) -> None:
        self._prepared.journal.lost(tensor)

    def noted(self, message: str) -> None:
        self._observer.noted(message)


def most_bytes(taken: Taken) -> int:
    """The most that a process of the run occupied: what is fetched is memory, though not of the
    resident set."""
    if taken.elsewhere_bytes is not None:
        return taken.elsewhere_bytes
    return peak_resident_bytes() + taken.held_bytes


def _run(
    plan: Plan,
    folder: Path,
    prepared: Prepared,
    held: OutputLock,
    workforce: Workforce,
    *,
    fsync: bool,
    observer: Observer,
    device: Device | None,
    strict: bool,
) -> RunReport:
    began = time.perf_counter()
    stamps = stamps_of(plan)
    writer, before = prepared.writer, prepared.recovery.finished
    done = _Progress(plan, prepared, observer)
    if strict and done.nonfinite:
        raise LazymergeError(nonfinite_error(next(iter(done.nonfinite))))
    observer.entered("merging")
    taken = workforce.make(
        plan,
        [task for task in plan.tasks if task.write.name not in before],
        writer,
        done,
        stamps=stamps,
        folder=folder,
        check=held.check,
        fsync=fsync,
        strict=strict,
    )
    observer.entered("finishing")
    check_unchanged(stamps, plan)
    writer.close()
    if not workforce.is_elsewhere:
        store_baseline(plan.memory.libraries)
    held.check()
    try:
        beside = write_beside_weights(plan, folder, folder.absolute().name, fsync=fsync)
        if fsync:
            sync_folder(folder)
    except OSError as error:
        raise write_error(Path(error.filename or folder), error) from error
    done.timeline.note(done.bytes_read, done.bytes_written, is_last=True)
    report = RunReport(
        output=str(folder.absolute()),
        seconds=time.perf_counter() - began,
        bytes_read=done.bytes_read,
        bytes_written=done.bytes_written,
        measured_bytes=most_bytes(taken),
        measured_vram_bytes=None if device is None else device.peak_bytes(),
        device=None if device is None else device.name,
        nonfinite=examine(plan, folder, done.nonfinite),
        resumed_tensors=len(before),
        cluster=taken.facts.get("cluster"),
        bytes_fetched=done.bytes_fetched,
    )
    try:
        checksums = {name: record.checksum for name, record in before.items()}
        checksums |= prepared.checksums
        document = manifest(
            plan, prepared.beginning, checksums, beside, folder, report, done.timeline
        )
        document["run"].update(taken.facts)
        if plan.execution.gathers:
            gathered = {name: record.statistics for name, record in before.items()}
            write_statistics(plan, folder, {**gathered, **prepared.statistics}, fsync=fsync)
        write_document(folder / MANIFEST_NAME, document, fsync=fsync)
        if fsync:
            sync_folder(folder)
    except OSError as error:
        raise write_error(folder / MANIFEST_NAME, error) from error
    prepared.journal.close()
    remove_beginnings(folder)
    return report
