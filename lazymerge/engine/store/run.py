"""Running a plan into an object store: what is there of it stays, the shards that are missing are
made, and what says that the output is complete comes last.

    lock ► merge.json ► shards, each with a record ► small files ► index ► lazymerge.json
         ► records and merge.json go

A run may end at any point, in any way, and another one goes on from there, shard by shard. Nothing
is on the local disk but the small files, in a private folder, while they are uploaded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...checkpoint.hub import Moved
from ...errors import InputError, LazymergeError
from ...output.folder import OWN_FOLDER, REPLACED_PATH
from ...output.layout import INDEX_NAME, Shard
from ...output.manifest import MANIFEST_NAME, MERGE_PATH, STATISTICS_NAME
from ...output.store.address import StoreAddress
from ...output.store.client import ConditionError, Store, StoredObject, UnsupportedError
from ...output.store.lock import StoreLock, store_lock_owner
from ...output.store.reading import StoredFile
from ...output.store.records import (
    ShardRecord,
    StoreContents,
    document_bytes,
    is_of_plan,
    is_own_object,
    look,
    read_record,
    record_name,
    remove_beginnings,
    remove_output,
    statistics_of,
)
from ...output.store.uploads import Made
from ..baseline import peak_resident_bytes, resident_bytes, store_baseline
from ..complete import check_complete, nonfinite_error
from ..download import download
from ..finishing import manifest, write_beside_weights
from ..inputs import ChangedInputError
from ..nonfinite import examine
from ..plan import Plan
from ..report import Observer, RunReport, Silent
from ..stages import bytes_read
from ..stamps import check_inputs, check_unchanged, stamps_of
from ..statistics_file import write_statistics
from ..streaming import AbandonedError, Conditions, FinishedTensor, Told, work_of
from ..tally import Tally
from ..timeline import Timeline
from ..unfinished import beginning_of_manifest, check_hashes, content_hashes
from ..workforce import Taken, most_bytes, outgrows_cache
from .contents import check_prefix, complete_in_store, file_names
from .memory import held_beside_client
from .shards import Target, store_shards


class ShardWorkforce(Protocol):
    """Makes the shards that an output in a store lacks."""

    is_elsewhere: bool
    """Whether that is done by other processes, which have limits of memory of their own."""

    may_go_on: bool
    """Whether they may still be at work, and complete a shard, when making them has failed."""

    def make_shards(
        self,
        plan: Plan,
        shards: Sequence[Shard],
        target: Target,
        told: Told,
        made: Made,
        conditions: Conditions,
    ) -> Taken:
        """As `store_shards`, with the same exceptions."""


class ThisProcessIntoStore:
    """The threads of this process."""

    is_elsewhere = False
    may_go_on = False

    def make_shards(
        self,
        plan: Plan,
        shards: Sequence[Shard],
        target: Target,
        told: Told,
        made: Made,
        conditions: Conditions,
    ) -> Taken:
        names = {tensor.name for shard in shards for tensor in shard.tensors}
        tasks = [task for task in plan.tasks if task.write.name in names]
        work = work_of(plan, tasks, forgets=outgrows_cache(plan))
        return Taken(store_shards(work, shards, target, told, made, conditions))


def run_into_store(
    plan: Plan,
    address: StoreAddress,
    *,
    overwrite: bool = False,
    observer: Observer | None = None,
    strict: bool = False,
    recheck: bool = False,
    hash_inputs: bool = False,
    workforce: ShardWorkforce | None = None,
) -> RunReport:
    """Runs a plan into a store, or goes on with what an earlier run of the same plan has left.

    overwrite, observer, strict, hash_inputs: as of `run_plan`.
    recheck: read the shards of an earlier run before believing what is said of them.
    workforce: who makes the shards; by default the threads of this process.

    Raises as `run_plan`, and:
        InputError: there is no such bucket, or it may not be read or written.
        LazymergeError: the store fails, again and again.

    Whatever it raises, shards that are complete stay, for another run to go on with; if there are
    none, the objects that it has made are removed.
    """
    observer, workforce = observer or Silent(), workforce or ThisProcessIntoStore()
    held_bytes = held_beside_client(resident_bytes())
    store = Store(address)
    prepare_store_inputs(plan, address, overwrite=overwrite)
    plan = _planned(plan.into_store(), workforce, held_bytes)
    contents = look(store)
    document = None if overwrite else complete_in_store(plan, contents)
    if document is None:
        check_prefix(plan, address, contents, overwrite=overwrite)
    else:
        check_complete(plan, document, observer, strict=strict, hash_inputs=hash_inputs)
        is_tidy = not _beginnings(contents) or store_lock_owner(store) is not None
        if is_tidy and not _missing(contents, document):
            return _nothing_to_do(plan, store, observer)
    with _locked(store, observer) as lock:
        contents = look(store)  # once more, now that nobody else writes
        document = None if overwrite else complete_in_store(plan, contents)
        if document is not None:
            _put_missing(plan, store, contents, document, observer)
            remove_beginnings(store, contents.own)
            return _nothing_to_do(plan, store, observer)
        resumes = check_prefix(plan, address, contents, overwrite=overwrite)
        if resumes and contents.merge and contents.merge.get("statistics") is True:
            plan = _planned(plan.with_statistics(), workforce, held_bytes)
        run = _Run(plan, store, lock, observer)
        try:
            run.prepare(contents if resumes else None, contents, recheck, hash_inputs)
            return run.run(workforce, strict=strict)
        except AbandonedError:
            raise
        except BaseException:
            if not workforce.may_go_on:  # else what is there is gone on with by the next run
                run.remove_if_nothing_is_done()
            raise


def _planned(plan: Plan, workforce: ShardWorkforce, held_bytes: int) -> Plan:
    return plan if workforce.is_elsewhere else plan.in_this_process(held_bytes)


def prepare_store_inputs(
    plan: Plan, address: StoreAddress, *, overwrite: bool, moved: Moved | None = None
) -> None:
    """As `prepare_inputs`, for an output in a store."""
    missing = plan.missing_files
    if missing:
        contents = look(Store(address))
        if not overwrite and complete_in_store(plan, contents) is not None:
            return
        check_prefix(plan, address, contents, overwrite=overwrite)
        download(missing, plan.checkpoints.values(), moved)
    check_inputs(plan)


@contextmanager
def _locked(store: Store, observer: Observer) -> Iterator[StoreLock]:
    lock = StoreLock(store)
    if lock.taken_over is not None:
        observer.noted(
            f"{lock.taken_over} was writing {store.address} and ended before it was done"
        )
    if not lock.is_supported:
        observer.noted(
            "the store knows no conditional requests: nothing keeps another run away from "
            f"{store.address}"
        )
    try:
        yield lock
    except AbandonedError:
        raise  # workers may still be uploading; the lock is free when the process has ended
    except BaseException:
        lock.release()
        raise
    lock.release()


def _put_missing(
    plan: Plan,
    store: Store,
    contents: StoreContents,
    document: Mapping[str, Any],
    observer: Observer,
) -> None:
    """Puts small files that a complete output lacks."""
    missing = _missing(contents, document)
    if missing:
        with _beside(plan, store.address) as (folder, written):
            for name in set(missing) & set(written):
                store.put(name, (folder / name).read_bytes())
        observer.noted(f"{', '.join(sorted(missing)[:4])} written anew: it was missing")


def _nothing_to_do(plan: Plan, store: Store, observer: Observer) -> RunReport:
    observer.noted(
        f"{store.address} holds this merge, complete; lazymerge verify reads it again, --overwrite "
        "makes it again"
    )
    if plan.execution.gathers and store.head(STATISTICS_NAME) is None:
        observer.noted("it was made without --stats; --overwrite makes it again with statistics")
    return RunReport(
        output=str(store.address),
        seconds=0.0,
        bytes_read=0,
        bytes_written=0,
        measured_bytes=peak_resident_bytes(),
        resumed_tensors=len(plan.tensors),
    )


def _missing(contents: StoreContents, document: Mapping[str, Any]) -> list[str]:
    """Small files of a complete output that are not there."""
    return [name for name in file_names(document) if name not in contents.objects]


def _beginnings(contents: StoreContents) -> list[str]:
    """What an output needs no more when it is complete, the lock of a run that was killed too."""
    return [name for name in contents.objects if name.startswith(f"{OWN_FOLDER}/")]


@contextmanager
def _beside(plan: Plan, address: StoreAddress) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The files beside the weights, in a private folder while the block runs, and their names; the
    index last."""
    with tempfile.TemporaryDirectory(prefix="lazymerge-") as name:
        try:
            written = write_beside_weights(plan, Path(name), address.name, fsync=False)
        except OSError as error:
            raise LazymergeError(
                f"cannot write small files into {name}: {error.strerror}; free some space there, "
                "or set TMPDIR"
            ) from error
        yield Path(name), tuple(sorted(written, key=lambda file: file == INDEX_NAME))


@dataclass(slots=True)
class _Run:
    """A run that has the lock."""

    plan: Plan
    store: Store
    lock: StoreLock
    observer: Observer
    beginning: dict[str, Any] | None = None
    records: dict[str, ShardRecord] | None = None

    def prepare(
        self,
        unfinished: StoreContents | None,
        contents: StoreContents,
        recheck: bool,
        hash_inputs: bool,
    ) -> None:
        """Has the output ready to be gone on with.

        unfinished: what there is of it; None: it is begun anew, in place of `contents`.
        """
        self.records = {}
        beginning = beginning_of_manifest(self.plan)
        then = None if unfinished is None else unfinished.merge
        if hash_inputs or (then is not None and "input_checksums" in then):
            self.observer.entered("hashing")
            beginning["input_checksums"] = content_hashes(self.plan.checkpoints)
            if then is not None and "input_checksums" in then:
                check_hashes(then["input_checksums"], beginning["input_checksums"], MERGE_PATH)
        if self.plan.execution.gathers:
            beginning["statistics"] = True
        self.beginning = beginning
        if unfinished is None:
            remove_output(self.store, contents.own)
            self._begin(beginning)
        else:
            self._believe(unfinished, recheck)
        self.abort_uploads()

    def _begin(self, beginning: Mapping[str, Any]) -> None:
        content, is_ours = document_bytes(beginning), True
        try:
            self.store.put(MERGE_PATH, content, only_if_absent=self.lock.is_supported)
        except ConditionError:  # by a request of ours whose answer was lost, or another's
            fetched = self.store.get(MERGE_PATH, 2 * len(content))
            is_ours = fetched is not None and fetched.content == content
        if not is_ours:
            raise InputError(f"another run has begun at {self.store.address}; look, and try again")
        self.store.remove([REPLACED_PATH])

    def _believe(self, unfinished: StoreContents, recheck: bool) -> None:
        """Takes over what the records of earlier runs say."""
        from .verification import shard_problems

        if recheck:
            self.observer.entered("checking")
        assert self.records is not None
        for shard in self.plan.shards:
            record = read_record(self.store, shard, unfinished.objects, self.plan.fingerprint)
            if record is None:
                continue
            if recheck and shard_problems(self.plan, self.store, record):
                self.observer.noted(f"{shard.file} is not what was written; it is made again")
                continue
            self.records[shard.file] = record
        done = {name for record in self.records.values() for name in record.tensors}
        places = [t for shard in self.plan.shards for t in shard.tensors if t.name in done]
        tasks = [task for task in self.plan.tasks if task.write.name in done]
        self.observer.resumed(
            sum(bytes_read(self.plan.graph, task) for task in tasks),
            sum(tensor.size_bytes for tensor in places),
            len(done),
        )

    def abort_uploads(self) -> None:
        """Throws away what runs that were killed have uploaded of shards, and not completed, those
        of other plans too: a worker that has not heard of it would complete them into this output.
        Where there are no locks, they may be of one that is alive."""
        if not self.lock.is_supported:
            return
        try:
            for upload in list(self.store.uploads()):
                if is_own_object(upload.name):
                    self.store.abort(upload)
        except (UnsupportedError, InputError):  # it may write, and not look for these
            self.observer.noted(
                "uploads that killed runs may have left cannot be listed or aborted here"
            )

    def remove_if_nothing_is_done(self) -> None:
        """Leaves no output behind that nobody could go on with."""
        if self.records or self.records is None or self.lock.is_lost:
            return
        with suppress(LazymergeError):  # what went wrong first is what is to be said
            self.abort_uploads()  # of a cluster's workers, that are gone or will be
            contents = look(self.store)
            if contents.manifest is None:
                remove_output(self.store, contents.own)
                self.store.remove([REPLACED_PATH])

    def run(self, workforce: ShardWorkforce, *, strict: bool) -> RunReport:
        """Makes what is missing."""
        assert self.records is not None
        began = time.perf_counter()
        plan, before = self.plan, dict(self.records)
        stamps = stamps_of(plan)
        left = len(plan.tensors) - sum(len(record.tensors) for record in before.values())
        self.observer.entered("merging")
        tally = _StoreTally(self.observer, left)
        nonfinite = _nonfinite_of(before)
        if strict and nonfinite:
            raise LazymergeError(nonfinite_error(nonfinite[0]))
        missing = [shard for shard in plan.shards if shard.file not in before]
        taken = Taken()
        try:
            if missing:
                taken = workforce.make_shards(
                    plan,
                    missing,
                    Target(self.store.address, plan.fingerprint),
                    tally,
                    self._made,
                    Conditions(stamps, self.lock.check, strict),
                )
            check_unchanged(stamps, plan)
        except ChangedInputError:  # what was made may be of another file, which may be put back
            with suppress(LazymergeError):
                self.store.remove([record_name(shard.file) for shard in missing])
            self.records = before
            raise
        if not workforce.is_elsewhere:
            store_baseline(plan.memory.libraries)
        self.lock.check()
        self.abort_uploads()  # of workers that are lost, and whose shards others have made
        tally.end()
        report = RunReport(
            output=str(self.store.address),
            seconds=time.perf_counter() - began,
            bytes_read=tally.bytes_read,
            bytes_written=tally.bytes_written,
            bytes_fetched=tally.bytes_fetched,
            measured_bytes=most_bytes(taken),
            cluster=taken.facts.get("cluster"),
            nonfinite=self._examined(),
            resumed_tensors=sum(len(record.tensors) for record in before.values()),
        )
        self._finish(report, tally.timeline)
        return report

    def _made(self, record: ShardRecord) -> None:
        assert self.records is not None
        self.records[record.file] = record

    def _examined(self) -> tuple[Any, ...]:
        assert self.records is not None
        files = {
            record.file: StoredFile(
                self.store, StoredObject(record.file, record.size_bytes, record.etag)
            )
            for record in self.records.values()
        }
        names = dict.fromkeys(_nonfinite_of(self.records))
        return examine(self.plan, Path(), names, files)

    def _finish(self, report: RunReport, timeline: Timeline) -> None:
        """Puts the small files, then what says that all is there."""
        assert self.records is not None
        assert self.beginning is not None
        plan, store = self.plan, self.store
        tensors = {
            name: tensor
            for record in self.records.values()
            for name, tensor in record.tensors.items()
        }
        checksums = {name: tensor.checksum for name, tensor in tensors.items()}
        with _beside(plan, store.address) as (folder, beside):
            for name in beside:
                store.put(name, (folder / name).read_bytes())
            if plan.execution.gathers:
                gathered = {name: statistics_of(each) for name, each in tensors.items()}
                write_statistics(plan, folder, gathered, fsync=False)
                store.put(STATISTICS_NAME, (folder / STATISTICS_NAME).read_bytes())
            document = manifest(plan, self.beginning, checksums, beside, folder, report, timeline)
        if report.cluster is not None:
            document["run"]["cluster"] = report.cluster
        self.lock.confirm()
        self._check_shards()
        store.put(MANIFEST_NAME, document_bytes({**document, "name": store.address.name}))
        with suppress(LazymergeError):  # it is complete all the same
            remove_beginnings(store, [*look(store).own])

    def _check_shards(self) -> None:
        """Checks that the objects are those that were made: a worker of an earlier run, of another
        plan, may have come back and completed what it had begun.

        Raises:
            LazymergeError: one is not there, or another.
        """
        assert self.records is not None
        absent = [shard.file for shard in self.plan.shards if shard.file not in self.records]
        if absent:
            raise LazymergeError(
                f"{self.store.address.url(absent[0])} was not made: a defect of lazymerge"
            )
        found = self.store.objects()
        for record in self.records.values():
            there = found.get(record.file)
            if there is not None and there.etag == record.etag:
                continue
            # made twice, by workers that did not know of each other: some stores give each another
            # ETag
            looked = self.store.head(record.file)
            if looked is None or not is_of_plan(*looked, record.size_bytes, record.fingerprint):
                with suppress(LazymergeError):
                    self.store.remove([record.name])
                raise LazymergeError(
                    f"{self.store.address.url(record.file)} is not what this run has made: another "
                    "run's worker has replaced it, or somebody has removed it. Run it again; the "
                    "other shards stay"
                )


def _nonfinite_of(records: Mapping[str, ShardRecord]) -> list[str]:
    return [
        name
        for record in records.values()
        for name, tensor in record.tensors.items()
        if tensor.is_nonfinite
    ]


class _StoreTally(Tally):
    """When all tensors are made, the last of their bytes are still to be uploaded."""

    def __init__(self, observer: Observer, tensors: int) -> None:
        """tensors: that are to be made."""
        super().__init__(observer)
        self._left = tensors
        if not tensors:
            observer.entered("finishing")

    def finished(self, tensor: FinishedTensor) -> None:
        """A tensor is made."""
        self._observer.finished(tensor.name)
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._observer.entered("finishing")
