"""Running a plan: prepare the output, let the workers stream, finish or clean up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Protocol

from xxhash import xxh3_128_hexdigest

from ..errors import InputError, LazymergeError
from ..graph.node import Read, Write
from ..methods import METHODS
from ..output.card import model_card
from ..output.folder import check_disk, check_output_folder, clear_output_folder
from ..output.layout import INDEX_NAME, index_json
from ..output.manifest import CHECKSUM, MANIFEST_NAME, write_manifest, write_text
from ..output.sidecars import copy_sidecars
from ..output.writer import ShardWriter, sync_folder, write_error
from ..version import __version__
from .baseline import peak_resident_bytes, resident_bytes, store_baseline
from .blocks import elements_per_block
from .device.frame import Lane
from .device.interface import Device
from .device.memory import fit_to_device, open_lanes
from .inputs import InputFiles
from .memory import available_memory_bytes
from .plan import Plan, read_folders
from .readahead import ReadAhead
from .recent import Recent
from .scheduler import SPAN_BLOCKS, Scheduler
from .stages import row_elements
from .worker import Worker

WAKE_SECONDS = 0.1
"""How often the waiting main thread looks up, so that Ctrl-C is answered."""


class Observer(Protocol):
    """Is told how a run proceeds; called from the workers' threads."""

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        """A block was done."""

    def finished(self, tensor: str) -> None:
        """An output tensor is complete."""


class _Silent:
    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        pass

    def finished(self, tensor: str) -> None:
        pass


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did.

    output: the folder, absolute.
    seconds: from the first block to the last byte synced; planning and start-up not included.
    bytes_read: of inputs, all passes.
    bytes_written: of tensors.
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


def run_plan(
    plan: Plan,
    output: Path | str,
    *,
    overwrite: bool = False,
    fsync: bool = True,
    observer: Observer | None = None,
    device: Device | None = None,
    strict: bool = False,
) -> RunReport:
    """Runs a plan into a folder.

    overwrite: replace what an earlier merge has left in the folder.
    fsync: wait until the data is on disk before giving files their final names.
    strict: inf or nan in the output is an error.
    device: the accelerator, for plans that are made for one; by default a GPU is looked for.

    Raises:
        InputError: an input has changed since it was planned, the folder cannot be used,
            integer tensors differ between models, or there is no such device as planned for.
        DoesNotFitError: the disk is full, or this process already holds so much that the merge
            does not fit beside it.
        LazymergeError: reading or writing fails.
        KeyboardInterrupt: interrupted.

    Whatever it raises, the files it has made are removed.
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
            )
    folder = Path(output)
    check_inputs(plan)
    plan = plan.in_this_process(resident_bytes())
    if device is not None:
        plan = fit_to_device(plan, device)
    check_output_folder(folder, read_folders(plan), overwrite=overwrite)
    check_disk(folder, plan.bytes_written, overwrite=overwrite)
    made = [f for f in (folder.absolute(), *folder.absolute().parents) if not f.exists()]
    clear_output_folder(folder)
    writer = ShardWriter(folder, plan.shards, fsync=fsync)
    try:
        writer.create()
        return _run(
            plan,
            folder,
            writer,
            fsync=fsync,
            observer=observer or _Silent(),
            device=device,
            strict=strict,
        )
    except BaseException:
        writer.discard()
        clear_output_folder(folder)
        with suppress(OSError):  # what holds somebody else's files stays
            for made_folder in made:
                made_folder.rmdir()
        raise


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
    writer: ShardWriter,
    *,
    fsync: bool,
    observer: Observer,
    device: Device | None,
    strict: bool,
) -> RunReport:
    began = time.perf_counter()
    checksums: dict[str, str] = {}
    totals = [0, 0]
    lock = threading.Lock()

    def finished(write: Write, digests: Sequence[bytes]) -> None:
        checksum = xxh3_128_hexdigest(b"".join(digest for digest in digests if digest))
        writer.finish_tensor(write.name)
        with lock:
            checksums[write.name] = checksum
        observer.finished(write.name)

    def moved(bytes_read: int, bytes_written: int, tensor: str) -> None:
        with lock:
            totals[0] += bytes_read
            totals[1] += bytes_written
        observer.moved(bytes_read, bytes_written, tensor)

    nonfinite: dict[str, None] = {}

    def found_nonfinite(tensor: str) -> None:
        if strict:
            raise LazymergeError(
                f"tensor {tensor} of the merge holds inf or nan; look for it in the inputs "
                "(or for a parameter that makes it), or leave --strict out"
            )
        with lock:
            nonfinite[tensor] = None

    scheduler = Scheduler(
        plan.graph,
        plan.tasks,
        finished,
        plan.execution.device,
        most_open=plan.memory.workers,
    )
    files = InputFiles()
    recent = Recent(8 * plan.memory.workers)
    forgets = outgrows_cache(plan)
    read_ahead = ReadAhead(plan.graph, plan.tasks, files, plan.execution.device)
    try:
        with _one_torch_thread() if plan.memory.libraries == "torch" else nullcontext():
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
            _work(scheduler, workers)
    finally:
        files.close()
    writer.close()
    try:
        write_beside_weights(plan, folder)
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
    )
    try:
        write_manifest(folder, _manifest(plan, checksums, report))
        if fsync:
            sync_folder(folder)
    except OSError as error:
        raise write_error(folder / MANIFEST_NAME, error) from error
    store_baseline(plan.memory.libraries)
    return report


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


def _work(scheduler: Scheduler, workers: Sequence[Worker]) -> None:
    """Runs all workers to the end; an error or an interruption stops them first.

    Waits for events and not by Thread.join: a join that Ctrl-C interrupts may take a thread that
    still runs for one that has ended, and a worker must not
    write on while the output is being removed.
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
    started = 0
    try:
        for thread in threads:
            thread.start()
            started += 1
        for ended in ends:
            while not ended.wait(WAKE_SECONDS):
                pass
    except BaseException:
        scheduler.stop()
        for ended in ends[:started]:
            ended.wait()
        raise
    for thread in threads:
        thread.join()
    if scheduler.error is not None:
        raise scheduler.error


def write_beside_weights(plan: Plan, folder: Path) -> None:
    """Writes index, config, tokenizer files and model card."""
    if len(plan.shards) > 1:
        write_text(folder / INDEX_NAME, index_json(plan.shards))
    if plan.config is not None:
        text = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
        write_text(folder / "config.json", text)
    copy_sidecars(plan.sidecar_folder, plan.sidecars, folder)
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
    write_text(folder / "README.md", card)


def _manifest(plan: Plan, checksums: dict[str, str], report: RunReport) -> dict[str, Any]:
    device = plan.execution.device
    spans = {
        write.name: SPAN_BLOCKS * elements_per_block(device, row_elements(plan.graph, write))
        for write in plan.graph.writes
    }
    return {
        "lazymerge": __version__,
        "torch": installed_version("torch"),
        "fingerprint": plan.fingerprint,
        "recipe": plan.recipe_dict(),
        "models": plan.models_dict(),
        "memory": {
            **plan.memory.as_dict(),
            "measured_bytes": report.measured_bytes,
            "measured_vram_bytes": report.measured_vram_bytes,
        },
        "nonfinite": list(report.nonfinite),
        "device": {"class": plan.execution.device, "name": report.device},
        "run": {
            "seconds": round(report.seconds, 3),
            "bytes_read": report.bytes_read,
            "bytes_written": report.bytes_written,
        },
        "checksum": CHECKSUM,
        "tensors": {
            tensor.name: {
                "file": shard.file,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "span_elements": spans[tensor.name],
                "checksum": checksums[tensor.name],
            }
            for shard in plan.shards
            for tensor in shard.tensors
        },
    }
