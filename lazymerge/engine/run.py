"""Running a plan: prepare the output, or what is there of it, let the workers stream, finish.

    lock ► recover ► create missing shards ► workers ─► journal ─► rename shards ► small files
         ► manifest ► remove .lazymerge

A run may end at any point, in any way, and another one goes on from there.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from ..checkpoint import Checkpoint
from ..checkpoint.folder import SUFFIX
from ..checkpoint.hub import Moved
from ..errors import InputError, LazymergeError
from ..graph.node import Read, Write
from ..graph.operations.statistics import added
from ..output.folder import clear_output_folder
from ..output.lock import OutputLock
from ..output.manifest import MANIFEST_NAME, STATISTICS_NAME, write_document
from ..output.writer import sync_folder, write_error
from . import torch_loading
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
from .device.frame import Lane
from .device.interface import Device
from .device.memory import fit_to_device, open_lanes
from .download import download
from .fetching import Fetcher
from .finishing import manifest, write_beside_weights
from .inputs import InputFiles, changed_error
from .memory import available_memory_bytes
from .native.bus_error import explained_bus_errors
from .nonfinite import examine
from .plan import Plan
from .preparing import Prepared, check_output, prepare
from .readahead import ReadAhead
from .recent import Recent
from .remote_reading import open_fetcher, tell_of_cache
from .report import Observer, RunReport, Silent
from .scheduler import Scheduler
from .stages import TensorTask
from .statistics_file import write_statistics
from .timeline import Timeline
from .unfinished import was_begun_with_statistics
from .worker import Worker, Written

WAKE_SECONDS = 0.1
"""How often the waiting main thread looks up, so that Ctrl-C is answered."""

PATIENCE_SECONDS = 1.0
"""How long an interrupted command waits for the blocks in flight; a block of 2^18 elements takes a
millisecond, a function of the user's over a whole tensor may take a minute. Its process then ends
all the same, within two seconds of the signal."""


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
) -> RunReport:
    """Runs a plan into a folder, or goes on with what an earlier run of the same plan has left.

    overwrite: replace what an earlier merge has left in the folder.
    fsync: wait until the data is on disk before giving files their final names.
    strict: inf or nan in the output is an error.
    device: the accelerator, for plans that are made for one; by default a GPU is looked for.
    recheck: read what an earlier run has written before believing it.
    hash_inputs: read all inputs once before, so that any change of them is noticed.

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
    if plan.execution.device == "cuda" and device is None:
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
            )
    folder = Path(output)
    prepare_inputs(plan, folder, overwrite=overwrite)
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
            plan = plan.with_statistics().in_this_process(resident_bytes())
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
    except _AbandonedError:
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
    except _AbandonedError as error:
        _close_later(error, prepared, lock)
        raise
    except BaseException as error:
        prepared.writer.close()
        prepared.journal.close()
        lock.touch()  # what is there may be another's by now
        if _is_to_be_removed(prepared, error) and not lock.is_lost:
            with suppress(OSError):  # what went wrong first is what is to be said
                prepared.writer.discard()
                clear_output_folder(folder)
        raise


def _close_later(error: _AbandonedError, prepared: Prepared, lock: OutputLock) -> None:
    """Closes an output and its inputs when the workers have ended, if the process lives to see
    that. The numbers of closed files are given to others, and a worker would read those."""

    def wait_and_close() -> None:
        for ended in error.running:
            ended.wait()
        if error.files is not None:
            _close_inputs(error.files, error.fetcher)
        prepared.writer.close()
        prepared.journal.close()
        lock.release()

    threading.Thread(target=wait_and_close, name="closing", daemon=True).start()


def _is_to_be_removed(prepared: Prepared, error: BaseException) -> bool:
    """Whether nobody could go on with what a run leaves: nothing is done; or an input is at fault,
    and when that has been put right it is another merge."""
    is_anything_done = prepared.recovery.finished or prepared.checksums
    return isinstance(error, InputError) or not is_anything_done


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


Stamps = Mapping[str, tuple[int, int]]
"""Sizes of files, and when they were modified last (nanoseconds since 1970), by path."""


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


def _run(
    plan: Plan,
    folder: Path,
    prepared: Prepared,
    held: OutputLock,
    *,
    fsync: bool,
    observer: Observer,
    device: Device | None,
    strict: bool,
) -> RunReport:
    began = time.perf_counter()
    stamps = stamps_of(plan)
    writer, before = prepared.writer, prepared.recovery.finished
    tasks = [task for task in plan.tasks if task.write.name not in before]
    places = {
        tensor.name: (shard.file, (tensor.start, tensor.stop_exclusive))
        for shard in plan.shards
        for tensor in shard.tensors
    }
    totals = [0, 0]
    timeline = Timeline()
    timeline.note(0, 0)
    lock = threading.Lock()

    def finished(write: Write, blocks: Sequence[Written | None]) -> None:
        spans = [span for span in blocks if span is not None]
        checksum = xxh3_128_hexdigest(b"".join(span.digest for span in spans))
        gathered = [numbers for span in spans for numbers in span.statistics]
        statistics = array("d", added(gathered) if gathered else ())
        file, place = places[write.name]
        prepared.journal.finished(
            write.name,
            file,
            place,
            checksum,
            is_nonfinite=write.name in nonfinite,
            identity=writer.identity(write.name),
            statistics=statistics,
        )
        with lock:
            prepared.checksums[write.name] = checksum
            if statistics:
                prepared.statistics[write.name] = statistics
        writer.finish_tensor(write.name)
        if fetcher is not None:
            fetcher.finished(numbers[write.name])
        observer.finished(write.name)

    def moved(bytes_read: int, bytes_written: int, tensor: str) -> None:
        with lock:
            totals[0] += bytes_read
            totals[1] += bytes_written
            timeline.note(*totals)
        observer.moved(bytes_read, bytes_written, tensor)

    nonfinite = {name: None for name, record in before.items() if record.is_nonfinite}
    if strict and nonfinite:
        raise LazymergeError(nonfinite_error(next(iter(nonfinite))))

    def found_nonfinite(tensor: str) -> None:
        if strict:
            raise LazymergeError(nonfinite_error(tensor))
        with lock:
            nonfinite[tensor] = None

    scheduler = Scheduler(
        plan.graph,
        tasks,
        finished,
        plan.execution.device,
        most_open=plan.memory.workers,
        began=observer.began,
    )
    numbers = {task.write.name: number for number, task in enumerate(tasks)}
    fetcher = _fetcher(plan, tasks, scheduler, observer)
    files = InputFiles(stamps, None if fetcher is None else fetcher.descriptors)
    is_mapped = plan.execution.read_mode == "mmap"
    recent = Recent(8 * plan.memory.workers)
    forgets = outgrows_cache(plan)
    read_ahead = ReadAhead(plan.graph, tasks, files, plan.execution.device)
    observer.entered("merging")
    try:
        with (
            one_torch_thread() if plan.memory.libraries == "torch" else nullcontext(),
            explained_bus_errors(folder) if is_mapped else nullcontext() as files.watch,
        ):
            workers = [
                Worker(
                    plan.graph,
                    scheduler,
                    writer,
                    files,
                    plan.memory.arena_bytes,
                    plan.execution,
                    moved,
                    found_nonfinite,
                    read_ahead,
                    recent,
                    lane,
                    forgets,
                    fetcher,
                )
                for lane in _lanes(plan, device)
            ]
            if device is not None:
                for worker in workers:
                    device.pin(worker.arena)
            work(scheduler, workers, held.check)
    except _AbandonedError as error:
        error.files = files  # a worker may be reading on
        error.fetcher = fetcher
        raise
    except BaseException:
        _close_inputs(files, fetcher)
        raise
    if fetcher is not None:
        tell_of_cache(fetcher, observer.noted)
    _close_inputs(files, fetcher)
    # what is fetched is memory, though not of the resident set
    held_bytes = 0 if fetcher is None else fetcher.most_held_bytes
    observer.entered("finishing")
    check_unchanged(stamps, plan)
    writer.close()
    store_baseline(plan.memory.libraries)
    held.check()
    try:
        beside = write_beside_weights(plan, folder, folder.absolute().name, fsync=fsync)
        if fsync:
            sync_folder(folder)
    except OSError as error:
        raise write_error(Path(error.filename or folder), error) from error
    timeline.note(*totals, is_last=True)
    report = RunReport(
        output=str(folder.absolute()),
        seconds=time.perf_counter() - began,
        bytes_read=totals[0],
        bytes_written=totals[1],
        measured_bytes=peak_resident_bytes() + held_bytes,
        measured_vram_bytes=None if device is None else device.peak_bytes(),
        device=None if device is None else device.name,
        nonfinite=examine(plan, folder, nonfinite),
        resumed_tensors=len(before),
    )
    try:
        checksums = {name: record.checksum for name, record in before.items()}
        checksums |= prepared.checksums
        document = manifest(plan, prepared.beginning, checksums, beside, folder, report, timeline)
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


def _fetcher(
    plan: Plan, tasks: Sequence[TensorTask], scheduler: Scheduler, observer: Observer
) -> Fetcher | None:
    """What has the inputs that lie elsewhere, where there are some."""
    if not plan.remote_inputs:
        return None
    return open_fetcher(
        plan.graph,
        tasks,
        plan.remote_inputs,
        plan.execution.network,
        plan.memory,
        lambda: scheduler.is_stopped,
        observer.noted,
    )


def _close_inputs(files: InputFiles, fetcher: Fetcher | None) -> None:
    files.close()
    if fetcher is not None:
        fetcher.close()


def _lanes(plan: Plan, device: Device | None) -> Sequence[Lane | None]:
    """Each worker's share of the device, where one computes."""
    if device is None:
        return [None] * plan.memory.workers
    return open_lanes(device, plan.memory)


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


class _AbandonedError(KeyboardInterrupt):
    """Interrupted, and a worker did not stop in time, or there was no time to wait for it: it may
    still be writing.

    running: events, set when the workers have ended.
    files: that they may be reading.
    """

    def __init__(self, running: Sequence[threading.Event]) -> None:
        super().__init__()
        self.running = running
        self.files: InputFiles | None = None
        self.fetcher: Fetcher | None = None


def work(
    scheduler: Scheduler, workers: Sequence[Worker], check: Callable[[], None] = lambda: None
) -> None:
    """Runs all workers to the end; an error or an interruption stops them first.

    check: is called every WAKE_SECONDS; if it raises, the workers are stopped.

    Waits for events and not by Thread.join: a join that Ctrl-C interrupts may take a thread that
    still runs for one that has ended, and a worker must not write on while the output is being
    removed.
    """

    def run_to_the_end(worker: Worker, ended: threading.Event) -> None:
        try:
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
            raise _AbandonedError(running) from error
        raise
    for thread in threads:
        thread.join()
    if scheduler.error is not None:
        raise scheduler.error


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
