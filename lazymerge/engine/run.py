"""Running a plan: prepare the output, or what is there of it, let the workers stream, finish.

    lock ► recover ► create missing shards ► workers ─► journal ─► rename shards ► small files
         ► manifest ► remove .lazymerge

A run may end at any point, in any way, and another one goes on from there.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from xxhash import xxh3_128_hexdigest

from ..checkpoint.tensor import DTYPES
from ..errors import InputError, LazymergeError
from ..graph.node import Read, Write
from ..methods import METHODS
from ..output.card import model_card
from ..output.folder import (
    OWN_FOLDER,
    check_disk,
    check_output_folder,
    clear_output_folder,
    is_unfinished,
)
from ..output.journal import JOURNAL_PATH, Journal, read_journal
from ..output.layout import INDEX_NAME, index_json
from ..output.lock import OutputLock
from ..output.manifest import (
    CHECKSUM,
    MANIFEST_NAME,
    MERGE_PATH,
    read_document,
    write_document,
    write_text,
)
from ..output.recovery import NOTHING, Recovery, is_doubted, recover
from ..output.sidecars import copy_sidecars
from ..output.writer import ShardWriter, sync_folder, write_error
from ..version import __version__
from . import torch_loading
from .baseline import peak_resident_bytes, resident_bytes, store_baseline
from .blocks import elements_per_block
from .device.frame import Lane
from .device.interface import Device
from .device.memory import fit_to_device, open_lanes
from .inputs import InputFiles
from .memory import available_memory_bytes
from .native.bus_error import explained_bus_errors
from .plan import Plan, read_folders
from .readahead import ReadAhead
from .recent import Recent
from .scheduler import SPAN_BLOCKS, Scheduler
from .stages import bytes_read, row_elements
from .unfinished import beginning_of_manifest, check_hashes, check_is_same_merge
from .unfinished import hash_inputs as hashes_of
from .worker import Worker

WAKE_SECONDS = 0.1
"""How often the waiting main thread looks up, so that Ctrl-C is answered."""

PATIENCE_SECONDS = 1.0
"""How long an interrupted command waits for the blocks in flight; a block of 2^18 elements takes a
millisecond, a function of the user's over a whole tensor may take a minute. Its process then ends
all the same, within two seconds of the signal."""


class Observer(Protocol):
    """Is told how a run proceeds; `moved` and `finished` are called from the workers' threads."""

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        """A block was done."""

    def finished(self, tensor: str) -> None:
        """An output tensor is complete."""

    def resumed(self, bytes_read: int, bytes_written: int, tensors: int) -> None:
        """An earlier run has done this much; called before all else, if at all."""

    def noted(self, message: str) -> None:
        """Something that a person should know."""


class _Silent:
    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        pass

    def finished(self, tensor: str) -> None:
        pass

    def resumed(self, bytes_read: int, bytes_written: int, tensors: int) -> None:
        pass

    def noted(self, message: str) -> None:
        pass


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did.

    output: the folder, absolute.
    seconds: from the first block to the last byte synced; planning and start-up not included.
    bytes_read: of inputs, all passes.
    bytes_written: of tensors.
    resumed_tensors: tensors that an earlier run had finished; none of their bytes is counted.
    measured_bytes: the process's peak resident set.
    measured_vram_bytes: the most that was allocated on an accelerator; device: its name.
    nonfinite: names of the output tensors that hold inf or nan, in the order of the output.
    """

    output: str
    seconds: float
    bytes_read: int
    bytes_written: int
    measured_bytes: int
    measured_vram_bytes: int | None = None
    device: str | None = None
    nonfinite: tuple[str, ...] = ()
    resumed_tensors: int = 0


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
    check_inputs(plan)
    plan = plan.in_this_process(resident_bytes())
    if device is not None:
        plan = fit_to_device(plan, device)
    observer = observer or _Silent()
    if not overwrite and _is_complete(plan, folder):
        tidy_up(folder)
        return _nothing_to_do(plan, folder, observer)
    _check_output(plan, folder, overwrite=overwrite)
    made = [f for f in (folder.absolute(), *folder.absolute().parents) if not f.exists()]
    lock = OutputLock(folder)
    try:
        if lock.taken_over is not None:
            observer.noted(f"{lock.taken_over} was writing {folder} and ended before it was done")
        # once more, now that nobody else writes
        if not overwrite and _is_complete(plan, folder):
            lock.release()
            return _nothing_to_do(plan, folder, observer)
        resumes = _check_output(plan, folder, overwrite=overwrite)
        prepared = _prepare(
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
        try:
            report = _run(
                plan,
                folder,
                prepared,
                lock,
                fsync=fsync,
                observer=observer,
                device=device,
                strict=strict,
            )
        except _AbandonedError as error:
            _close_later(error.running, prepared, lock)
            raise
        except BaseException as error:
            prepared.writer.close()
            prepared.journal.close()
            if _is_to_be_removed(prepared, error):
                prepared.writer.discard()
                clear_output_folder(folder)
            raise
    except _AbandonedError:
        raise  # what a worker may be writing to stays open, and locked, until it has ended
    except BaseException:
        lock.release()
        with suppress(OSError):  # what holds anything stays
            for made_folder in made:
                made_folder.rmdir()
        raise
    lock.release()
    return report


def _close_later(running: Sequence[threading.Event], prepared: _Prepared, lock: OutputLock) -> None:
    """Closes an output when its workers have ended, if the process lives to see that."""

    def wait_and_close() -> None:
        for ended in running:
            ended.wait()
        prepared.writer.close()
        prepared.journal.close()
        lock.release()

    threading.Thread(target=wait_and_close, name="closing", daemon=True).start()


def _is_to_be_removed(prepared: _Prepared, error: BaseException) -> bool:
    """Whether nobody could go on with what a run leaves: nothing is done; or an input is at fault,
    and when that has been put right it is another merge."""
    is_anything_done = prepared.recovery.finished or prepared.checksums
    return isinstance(error, InputError) or not is_anything_done


def tidy_up(folder: Path) -> None:
    """Removes what a run that was killed after its manifest was written has left."""
    if not (folder / OWN_FOLDER).is_dir() or (folder / OWN_FOLDER).is_symlink():
        return
    with suppress(LazymergeError):  # the one that is still at it will do so
        lock = OutputLock(folder)
        _remove_beginnings(folder)
        lock.release()


def _remove_beginnings(folder: Path) -> None:
    for path in (JOURNAL_PATH, MERGE_PATH):
        with suppress(OSError):  # the manifest is there: the output is complete
            (folder / path).unlink()


def _is_complete(plan: Plan, folder: Path) -> bool:
    """Whether a folder's manifest is that of this plan, and its files are as long as they must."""
    try:
        if read_document(folder / MANIFEST_NAME).get("fingerprint") != plan.fingerprint:
            return False
        sizes = [(folder / shard.file).stat().st_size for shard in plan.shards]
    except (InputError, OSError):
        return False
    return sizes == [shard.size_bytes for shard in plan.shards]


def _nothing_to_do(plan: Plan, folder: Path, observer: Observer) -> RunReport:
    observer.noted(
        f"{folder} holds this merge, complete; lazymerge verify reads it again, --overwrite makes "
        "it again"
    )
    return RunReport(
        output=str(folder.absolute()),
        seconds=0.0,
        bytes_read=0,
        bytes_written=0,
        measured_bytes=peak_resident_bytes(),
        resumed_tensors=len(plan.tensors),
    )


def _check_output(plan: Plan, folder: Path, *, overwrite: bool) -> bool:
    """Whether there is an unfinished output to go on with.

    Raises:
        InputError: the folder cannot be used.
    """
    resumes = not overwrite and is_unfinished(folder)
    if resumes:
        check_is_same_merge(plan, folder)
    check_output_folder(folder, read_folders(plan), overwrite=overwrite, resumes=resumes)
    return resumes


@dataclass(slots=True)
class _Prepared:
    """An output that is ready to be written.

    checksums: of the tensors that this run has finished.
    beginning: the first half of the manifest.
    """

    recovery: Recovery
    writer: ShardWriter
    journal: Journal
    beginning: dict[str, Any]
    checksums: dict[str, str] = field(default_factory=dict)


def _prepare(
    plan: Plan,
    folder: Path,
    *,
    resumes: bool,
    overwrite: bool,
    fsync: bool,
    observer: Observer,
    recheck: bool,
    hash_inputs: bool,
    made: Sequence[Path],
) -> _Prepared:
    """made: folders that were not there before."""
    recovery, length = NOTHING, 0
    if resumes:
        beginning = read_document(folder / MERGE_PATH)
        if hash_inputs or "input_checksums" in beginning:
            check_hashes(beginning.get("input_checksums"), hashes_of(plan.checkpoints))
        try:
            journal = read_journal(folder)
        except OSError as error:
            raise LazymergeError(f"cannot read {folder / JOURNAL_PATH}: {error}") from error
        if journal.fingerprint == plan.fingerprint:
            length = journal.length
            believed = journal.finished
        else:  # not even its first line is whole
            believed = {}
        doubted = sum(recheck or is_doubted(record) for record in believed.values())
        if doubted:
            observer.noted(f"reading {doubted} tensors of an earlier run before believing them")
        recovery = recover(
            folder, plan.shards, believed, span_bytes(plan).__getitem__, recheck=recheck
        )
        _tell(plan, recovery, observer)
    else:
        check_disk(folder, plan.bytes_written, overwrite=overwrite)
        beginning = beginning_of_manifest(plan)
        if hash_inputs:
            beginning["input_checksums"] = hashes_of(plan.checkpoints)
        clear_output_folder(folder, fsync=fsync)
    writer = ShardWriter(
        folder,
        plan.shards,
        fsync=fsync,
        begun=recovery.begun,
        complete=recovery.complete,
        finished=recovery.finished,
    )
    try:
        if not resumes:
            try:
                write_document(folder / MERGE_PATH, beginning, fsync=fsync)
            except OSError as error:
                raise write_error(folder / MERGE_PATH, error) from error
        journal_file = Journal(folder, plan.fingerprint, length, fsync=fsync)
        try:
            if fsync:  # what says that the folder is ours, before anything that is to be ours
                for made_or_filled in (folder, *(new.parent for new in made)):
                    sync_folder(made_or_filled)
            writer.create()
            if fsync:
                sync_folder(folder)
        except BaseException:
            journal_file.close()
            raise
    except BaseException:
        writer.close()
        if not recovery.finished:
            writer.discard()
            clear_output_folder(folder)
        raise
    return _Prepared(recovery, writer, journal_file, beginning)


def _tell(plan: Plan, recovery: Recovery, observer: Observer) -> None:
    tasks = [task for task in plan.tasks if task.write.name in recovery.finished]
    observer.resumed(
        sum(bytes_read(plan.graph, task) for task in tasks),
        sum(record.stop_exclusive - record.start for record in recovery.finished.values()),
        len(recovery.finished),
    )
    if recovery.lost:
        observer.noted(f"{recovery.lost} of the earlier tensors are not whole; they are made again")


def span_bytes(plan: Plan) -> dict[str, int]:
    """Length of every output tensor's spans, by name."""
    return {
        write.name: span_elements(plan, write) * DTYPES[write.dtype].item_bytes
        for write in plan.graph.writes
    }


def span_elements(plan: Plan, write: Write) -> int:
    """Elements of an output tensor's spans, which its checksum is made of."""
    row = row_elements(plan.graph, write)
    return SPAN_BLOCKS * elements_per_block(plan.execution.device, row)


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


def check_inputs(plan: Plan) -> None:
    """Checks that the inputs are the files that were planned, and has the safetensors library
    check their headers once more by its own rules.

    Raises:
        InputError: one is not.
    """
    from safetensors import SafetensorError, safe_open

    for checkpoint in plan.checkpoints.values():
        for file in checkpoint.files:
            path = Path(checkpoint.folder) / file.path
            try:
                status = path.stat()
                with safe_open(path, framework="np"):
                    pass
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path} cannot be read: {error}") from error
            if (status.st_size, status.st_mtime_ns) != (file.size_bytes, file.modified_ns):
                raise InputError(f"{path} has changed since the merge was planned; plan it again")


def _run(
    plan: Plan,
    folder: Path,
    prepared: _Prepared,
    output_lock: OutputLock,
    *,
    fsync: bool,
    observer: Observer,
    device: Device | None,
    strict: bool,
) -> RunReport:
    began = time.perf_counter()
    writer, before = prepared.writer, prepared.recovery.finished
    tasks = [task for task in plan.tasks if task.write.name not in before]
    places = {
        tensor.name: (shard.file, (tensor.start, tensor.stop_exclusive))
        for shard in plan.shards
        for tensor in shard.tensors
    }
    totals = [0, 0]
    lock = threading.Lock()

    def finished(write: Write, digests: Sequence[bytes]) -> None:
        checksum = xxh3_128_hexdigest(b"".join(digest for digest in digests if digest))
        file, place = places[write.name]
        prepared.journal.finished(
            write.name, file, place, checksum, is_nonfinite=write.name in nonfinite
        )
        with lock:
            prepared.checksums[write.name] = checksum
        writer.finish_tensor(write.name)
        observer.finished(write.name)

    def moved(bytes_read: int, bytes_written: int, tensor: str) -> None:
        with lock:
            totals[0] += bytes_read
            totals[1] += bytes_written
        observer.moved(bytes_read, bytes_written, tensor)

    nonfinite = {name: None for name, record in before.items() if record.is_nonfinite}
    if strict and nonfinite:
        raise LazymergeError(_nonfinite_error(next(iter(nonfinite))))

    def found_nonfinite(tensor: str) -> None:
        if strict:
            raise LazymergeError(_nonfinite_error(tensor))
        with lock:
            nonfinite[tensor] = None

    scheduler = Scheduler(
        plan.graph,
        tasks,
        finished,
        plan.execution.device,
        most_open=plan.memory.workers,
    )
    files = InputFiles(plan.execution.read_mode)
    is_mapped = plan.execution.read_mode == "mmap"
    recent = Recent(8 * plan.memory.workers)
    forgets = outgrows_cache(plan)
    read_ahead = ReadAhead(plan.graph, tasks, files, plan.execution.device)
    try:
        with (
            _one_torch_thread() if plan.memory.libraries == "torch" else nullcontext(),
            explained_bus_errors(folder) if is_mapped else nullcontext(),
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
                )
                for lane in _lanes(plan, device)
            ]
            if device is not None:
                for worker in workers:
                    device.pin(worker.arena)
            _work(scheduler, workers, output_lock.touch)
    finally:
        files.close()
    writer.close()
    try:
        write_beside_weights(plan, folder, fsync=fsync)
        if fsync:
            sync_folder(folder)
    except OSError as error:
        raise write_error(Path(error.filename or folder), error) from error
    report = RunReport(
        output=str(folder.absolute()),
        seconds=time.perf_counter() - began,
        bytes_read=totals[0],
        bytes_written=totals[1],
        measured_bytes=peak_resident_bytes(),
        measured_vram_bytes=None if device is None else device.peak_bytes(),
        device=None if device is None else device.name,
        nonfinite=tuple(w.name for w in plan.graph.writes if w.name in nonfinite),
        resumed_tensors=len(before),
    )
    try:
        write_document(folder / MANIFEST_NAME, _manifest(plan, prepared, report), fsync=fsync)
        if fsync:
            sync_folder(folder)
    except OSError as error:
        raise write_error(folder / MANIFEST_NAME, error) from error
    prepared.journal.close()
    _remove_beginnings(folder)
    store_baseline(plan.memory.libraries)
    return report


def _nonfinite_error(tensor: str) -> str:
    return (
        f"tensor {tensor} of the merge holds inf or nan; look for it in the inputs "
        "(or for a parameter that makes it), or leave --strict out"
    )


def _lanes(plan: Plan, device: Device | None) -> Sequence[Lane | None]:
    """Each worker's share of the device, where one computes."""
    if device is None:
        return [None] * plan.memory.workers
    return open_lanes(device, plan.memory)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
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
    """

    def __init__(self, running: Sequence[threading.Event]) -> None:
        super().__init__()
        self.running = running


def _work(
    scheduler: Scheduler, workers: Sequence[Worker], wake: Callable[[], None] = lambda: None
) -> None:
    """Runs all workers to the end; an error or an interruption stops them first.

    wake: is called every WAKE_SECONDS.

    Waits for events and not by Thread.join: a join that Ctrl-C interrupts may take a thread that
    still runs for one that has ended, and a worker must not write on while the output is being
    removed.
    """

    def work(worker: Worker, ended: threading.Event) -> None:
        try:
            worker.run()
        finally:
            ended.set()

    ends = [threading.Event() for _ in workers]
    threads = [
        threading.Thread(target=work, args=pair, name=f"worker-{number}", daemon=True)
        for number, pair in enumerate(zip(workers, ends, strict=True))
    ]
    try:
        for thread in threads:
            thread.start()
        for ended in ends:
            while not ended.wait(WAKE_SECONDS):
                wake()
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


def write_beside_weights(plan: Plan, folder: Path, *, fsync: bool) -> None:
    """Writes index, config, tokenizer files and model card."""
    if len(plan.shards) > 1:
        write_text(folder / INDEX_NAME, index_json(plan.shards), fsync=fsync)
    if plan.config is not None:
        text = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
        write_text(folder / "config.json", text, fsync=fsync)
    copy_sidecars(plan.sidecar_folder, plan.sidecars, folder, fsync=fsync)
    signature = METHODS[plan.recipe.merge_method].signature
    card = model_card(
        folder.absolute().name,
        plan.recipe.text,
        signature.name,
        signature.summary,
        signature.source,
        list(plan.checkpoints),
        plan.recipe.base_model,
        __version__,
    )
    write_text(folder / "README.md", card, fsync=fsync)


def _manifest(plan: Plan, prepared: _Prepared, report: RunReport) -> dict[str, Any]:
    before = prepared.recovery.finished
    checksums = {name: record.checksum for name, record in before.items()} | prepared.checksums
    writes = {write.name: write for write in plan.graph.writes}
    return {
        **{key: value for key, value in prepared.beginning.items() if key != "format"},
        "memory": {
            **plan.memory.as_dict(),
            "measured_bytes": report.measured_bytes,
            "measured_vram_bytes": report.measured_vram_bytes,
        },
        "nonfinite": list(report.nonfinite),
        "device_name": report.device,
        "run": {
            "seconds": round(report.seconds, 3),
            "bytes_read": report.bytes_read,
            "bytes_written": report.bytes_written,
            "resumed_tensors": report.resumed_tensors,
        },
        "checksum": CHECKSUM,
        "tensors": {
            tensor.name: {
                "file": shard.file,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "span_elements": span_elements(plan, writes[tensor.name]),
                "checksum": checksums[tensor.name],
            }
            for shard in plan.shards
            for tensor in shard.tensors
        },
    }
