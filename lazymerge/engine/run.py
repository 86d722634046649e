"""Running a plan: prepare the output, or what is there of it, let the workers stream, finish.

    lock ► recover ► create missing shards ► workers ─► journal ─► rename shards ► small files
         ► manifest ► remove .lazymerge

A run may end at any point, in any way, and another one goes on from there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from ..checkpoint.hub import Moved
from ..errors import InputAtFaultError, LazymergeError
from ..output.folder import clear_output_folder
from ..output.lock import OutputLock
from ..output.manifest import MANIFEST_NAME, STATISTICS_NAME, write_document
from ..output.writer import sync_folder, write_error
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
from .inputs import ChangedInputError
from .nonfinite import examine
from .plan import Plan
from .preparing import Prepared, check_output, prepare
from .report import Observer, RunReport, Silent
from .stamps import check_inputs, check_unchanged, stamps_of
from .statistics_file import write_statistics
from .streaming import AbandonedError, Conditions, FinishedTensor
from .tally import Tally
from .unfinished import was_begun_with_statistics
from .workforce import ThisProcess, Workforce, most_bytes


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


class _FolderTally(Tally):
    """Enters finished tensors in the journal, too."""

    def __init__(self, plan: Plan, prepared: Prepared, observer: Observer) -> None:
        super().__init__(observer)
        self._prepared = prepared
        self._places = {
            tensor.name: (shard.file, (tensor.start, tensor.stop_exclusive))
            for shard in plan.shards
            for tensor in shard.tensors
        }
        before = prepared.recovery.finished.items()
        self.nonfinite = {name: None for name, record in before if record.is_nonfinite}

    def finished(self, tensor: FinishedTensor) -> None:
        """A tensor is written."""
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
        """A finished tensor is to be made again."""
        self._prepared.journal.lost(tensor)


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
    done = _FolderTally(plan, prepared, observer)
    if strict and done.nonfinite:
        raise LazymergeError(nonfinite_error(next(iter(done.nonfinite))))
    observer.entered("merging")
    taken = workforce.make(
        plan,
        [task for task in plan.tasks if task.write.name not in before],
        writer,
        done,
        Conditions(stamps, held.check, strict),
        folder=folder,
        fsync=fsync,
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
    done.end()
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
