"""An output folder before a run: empty, or unfinished and to be gone on with."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LazymergeError
from ..output.folder import (
    check_disk,
    check_output_folder,
    clear_output_folder,
    is_unfinished,
)
from ..output.journal import JOURNAL_PATH, Finished, Journal, read_journal
from ..output.manifest import MERGE_PATH, read_document, write_document
from ..output.recovery import NOTHING, Recovery, is_doubted, recover
from ..output.writer import ShardWriter, sync_file, sync_folder, write_error
from ..sizes import counted
from .finishing import span_bytes
from .plan import Plan, read_folders
from .remote_facts import check_cache_disk
from .report import Observer
from .stages import bytes_read
from .unfinished import (
    beginning_of_manifest,
    check_hashes,
    check_is_same_merge,
    content_hashes,
)


def check_output(plan: Plan, folder: Path, *, overwrite: bool, inputs: Sequence[str] = ()) -> bool:
    """Whether there is an unfinished output to go on with.

    inputs: folders that it may not be, besides those that the plan reads from.

    Raises:
        InputError: the folder cannot be used.
    """
    resumes = not overwrite and is_unfinished(folder)
    if resumes:
        check_is_same_merge(plan, folder)
    inputs = (*read_folders(plan), *inputs)
    check_output_folder(folder, inputs, overwrite=overwrite, resumes=resumes)
    return resumes


@dataclass(slots=True)
class Prepared:
    """An output that is ready to be written.

    checksums: of the tensors that this run has finished.
    statistics: gathered of them, by name.
    beginning: the first half of the manifest.
    """

    recovery: Recovery
    writer: ShardWriter
    journal: Journal
    beginning: dict[str, Any]
    checksums: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, array[float]] = field(default_factory=dict)


def prepare(
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
) -> Prepared:
    """made: folders that were not there before."""
    check_cache_disk(plan.cache_state, folder, 0 if resumes or overwrite else plan.bytes_written)
    recovery, length = NOTHING, 0
    believed: dict[str, Finished] = {}
    if resumes:
        beginning = _beginning_to_go_on_with(plan, folder, observer, hash_inputs=hash_inputs)
        try:
            journal = read_journal(folder)
        except OSError as error:
            raise LazymergeError(f"cannot read {folder / JOURNAL_PATH}: {error}") from error
        if journal.fingerprint == plan.fingerprint:
            length = journal.length
            believed = journal.finished
        # else not even its first line is whole
        doubted = sum(recheck or is_doubted(record) for record in believed.values())
        if doubted:
            observer.entered("checking")
            them = "it" if doubted == 1 else "them"
            observer.noted(
                f"reading {counted(doubted, 'tensor')} of an earlier run before believing {them}"
            )
        recovery = recover(
            folder, plan.shards, believed, span_bytes(plan).__getitem__, recheck=recheck
        )
        _tell(plan, recovery, observer)
    else:
        check_disk(folder, plan.bytes_written, overwrite=overwrite)
        beginning = beginning_of_manifest(plan)
        if hash_inputs:
            observer.entered("hashing")
            beginning["input_checksums"] = content_hashes(plan.checkpoints)
        if plan.execution.gathers:
            beginning["statistics"] = True
        try:
            clear_output_folder(folder, fsync=fsync)
        except OSError as error:
            raise write_error(Path(error.filename or folder), error) from error
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
            _write_beginning(folder, beginning, fsync=fsync)
        elif fsync:  # the run before may not have waited for the disk
            sync_file(folder / MERGE_PATH)
        journal_file = Journal(folder, plan.fingerprint, length, fsync=fsync)
        try:
            for name in believed.keys() - recovery.finished.keys():
                journal_file.lost(name)
            if fsync:  # what says that the folder is ours, before anything that is to be ours
                for changed in {folder, folder.absolute().parent, *(new.parent for new in made)}:
                    with suppress(PermissionError):  # one that may be entered and not listed
                        _sync_folder(changed)
            writer.create()
            if fsync:
                _sync_folder(folder)
        except BaseException:
            journal_file.close()
            raise
    except BaseException:
        writer.close()
        if not recovery.finished:
            with suppress(OSError):  # what went wrong first is what is to be said
                writer.discard()
                clear_output_folder(folder)
        raise
    return Prepared(recovery, writer, journal_file, beginning)


def _beginning_to_go_on_with(
    plan: Plan, folder: Path, observer: Observer, *, hash_inputs: bool
) -> dict[str, Any]:
    """The first half of an unfinished output's manifest, with the inputs' contents compared where
    that was or is asked for.

    Raises:
        InputError: an input has other contents.
    """
    document = read_document(folder / MERGE_PATH)
    beginning = beginning_of_manifest(plan)  # the document may be damaged, or somebody else's
    if "input_checksums" in document or hash_inputs:
        observer.entered("hashing")
    if "input_checksums" in document:
        now = content_hashes(plan.checkpoints)
        check_hashes(document["input_checksums"], now, MERGE_PATH)
        beginning["input_checksums"] = now
    elif hash_inputs:
        observer.noted(
            "the merge was begun without --hash-inputs: contents are compared from now on, what "
            "they were before is not known"
        )
        beginning["input_checksums"] = content_hashes(plan.checkpoints)
    document.pop("format")
    if plan.execution.gathers:
        beginning["statistics"] = True
    if json.dumps(document, sort_keys=True) != json.dumps(beginning, sort_keys=True):
        _write_beginning(folder, beginning, fsync=True)
    return beginning


def _sync_folder(folder: Path) -> None:
    try:
        sync_folder(folder)
    except PermissionError:
        raise
    except OSError as error:
        raise write_error(folder, error) from error


def _write_beginning(folder: Path, beginning: dict[str, Any], *, fsync: bool) -> None:
    try:
        write_document(folder / MERGE_PATH, beginning, fsync=fsync)
    except OSError as error:
        raise write_error(folder / MERGE_PATH, error) from error


def _tell(plan: Plan, recovery: Recovery, observer: Observer) -> None:
    tasks = [task for task in plan.tasks if task.write.name in recovery.finished]
    observer.resumed(
        sum(bytes_read(plan.graph, task) for task in tasks),
        sum(record.stop_exclusive - record.start for record in recovery.finished.values()),
        len(recovery.finished),
    )
    if recovery.lost:
        observer.noted(
            f"{counted(recovery.lost, 'tensor')} of an earlier run "
            f"{'is' if recovery.lost == 1 else 'are'} not whole, and made again"
        )
