"""Outputs that are complete already: recognised, tidied up, and their small files kept true.

A plan's fingerprint covers the weights, which are the work. The small files beside them may change
without it: a tokenizer file of the base model, a line of its config, a comment of the recipe; or
somebody has removed the model card. They are then written anew, and nothing is merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from ..checkpoint import is_plain_name
from ..errors import InputError, LazymergeError
from ..output.checksum import file_checksum
from ..output.folder import (
    CLUSTER_PATTERN,
    OWN_FOLDER,
    REPLACED_PATH,
    REWRITING_PATH,
    is_own_name,
    is_unfinished,
)
from ..output.journal import JOURNAL_PATH
from ..output.lock import OutputLock
from ..output.manifest import MANIFEST_NAME, MERGE_PATH, read_document, write_document
from ..output.writer import PARTIAL_SUFFIX, sync_folder, write_error
from .download import download
from .finishing import beside_weights, faults, write_beside_weights
from .plan import Plan
from .report import Observer
from .unfinished import beginning_of_manifest, check_hashes, content_hashes

MOST_NAMED = 4
"""Files named in a note."""


def complete_document(plan: Plan, folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that holds this plan's weights, complete; None if it does not.

    Its shards are there and as long as they must be. Of the small files some may be missing.
    """
    try:
        document = read_document(folder / MANIFEST_NAME)
        if document.get("fingerprint") != plan.fingerprint:
            return None
        return None if faults(document, folder, small_files=False) else document
    except InputError:
        return None


def tidy_up(folder: Path, plan: Plan | None = None) -> None:
    """Removes what a run that was killed after its manifest was written has left.

    plan: the one that it is complete by.
    """
    if not (folder / OWN_FOLDER).is_dir() or (folder / OWN_FOLDER).is_symlink():
        return
    try:
        read_document(folder / MANIFEST_NAME)
    except InputError:
        return  # it says nothing: what is beside it may still be wanted
    with suppress(LazymergeError):  # the one that is still at it will do so
        lock = OutputLock(folder)
        try:
            # still, now that nobody else writes
            if not is_unfinished(folder) and (plan is None or complete_document(plan, folder)):
                remove_beginnings(folder)
        finally:
            lock.release()


def remove_beginnings(folder: Path) -> None:
    """Removes what an output needs no more when its manifest is there."""
    partial = REWRITING_PATH + PARTIAL_SUFFIX
    for path in (JOURNAL_PATH, MERGE_PATH + PARTIAL_SUFFIX, MERGE_PATH, REPLACED_PATH, partial):
        with suppress(OSError):  # it is complete all the same
            (folder / path).unlink()
    with suppress(OSError):
        for entry in (folder / OWN_FOLDER).glob(CLUSTER_PATTERN):
            with suppress(OSError):
                entry.unlink()
        for entry in folder.iterdir():
            if entry.name.endswith(PARTIAL_SUFFIX) and is_own_name(entry.name):
                with suppress(OSError):
                    entry.unlink()


def check_complete(
    plan: Plan,
    document: Mapping[str, Any],
    observer: Observer,
    *,
    strict: bool,
    hash_inputs: bool,
) -> None:
    """Whether a complete output is what is asked for now.

    document: its manifest.

    Raises:
        InputError: an input's content is not what it was, or the manifest is damaged.
        LazymergeError: it holds inf or nan and may not.
    """
    if strict and document.get("nonfinite"):
        try:
            name = document["nonfinite"][0]["name"]
        except (KeyError, IndexError, TypeError):
            name = "?"
        raise LazymergeError(nonfinite_error(str(name)[:200]))
    if hash_inputs:
        then = document.get("input_checksums")
        if then is None:
            observer.noted(
                "it was merged without --hash-inputs: what the inputs' contents were is not known"
            )
        else:
            check_hashes(then, content_hashes(plan.checkpoints), MANIFEST_NAME)


class NonfiniteError(LazymergeError):
    """A tensor holds inf or nan and may not (exit code 1)."""


def nonfinite_error(tensor: str) -> str:
    return (
        f"tensor {tensor} of the merge holds inf or nan; look for it in the inputs "
        "(or for a parameter that makes it), or leave --strict out"
    )


@dataclass(frozen=True, slots=True)
class Stale:
    """Small files of a complete output that are not what they would be now.

    written: to be written: missing, or as they once were.
    removed: the plan has them no more.
    recorded: that they are right the manifest does not know yet.
    edited: somebody's by now; they stay.
    checksums: of all that would be written now.
    """

    written: tuple[str, ...]
    removed: tuple[str, ...]
    recorded: tuple[str, ...]
    edited: tuple[str, ...]
    checksums: Mapping[str, str]

    @property
    def asks_for_work(self) -> bool:
        return bool(self.written or self.removed or self.recorded)


def stale_files(plan: Plan, document: Mapping[str, Any], folder: Path) -> Stale:
    """What of the small files of a complete output is not as it would be now.

    Raises:
        InputError: the manifest is damaged, or a folder stands where a file belongs.
        LazymergeError: a file cannot be read.
    """
    then = document.get("files")
    if not isinstance(then, dict):
        raise InputError(f"{folder / MANIFEST_NAME} is damaged: its files are no mapping")
    absent = {(file.source.folder, file.name) for file in plan.missing_files}
    ours = _being_written(folder)
    checksums: dict[str, str] = {}
    found: dict[str, list[str]] = {"written": [], "removed": [], "recorded": [], "edited": []}
    try:
        for name, content in beside_weights(plan, _title(document, folder)):
            path = folder / name
            if path.is_dir():
                raise InputError(
                    f"{path} is a folder, and no merge has made it; move it away, or choose "
                    "another output folder"
                )
            known = then.get(name)
            if not isinstance(content, bytes) and (plan.sidecar_folder, name) in absent:
                checksums[name] = str(known)  # of the Hub: its commit says that it is what it was
            else:
                checksums[name] = (
                    xxh3_128_hexdigest(content)
                    if isinstance(content, bytes)
                    else file_checksum(content)
                )
            now = file_checksum(path) if path.is_file() else None
            if now is None or (name in ours and now != checksums[name]):
                found["written"].append(name)
            elif known != checksums[name]:
                is_right, is_as_written = now == checksums[name], now == known
                kind = "recorded" if is_right else "written" if is_as_written else "edited"
                found[kind].append(name)
        for name in then.keys() - checksums.keys():
            path = folder / name
            if not (is_plain_name(name) and is_own_name(name)):
                continue
            is_gone = not path.is_file()
            is_ours = is_gone or file_checksum(path) == then[name] or name in ours
            found["removed" if is_ours else "edited"].append(name)
    except OSError as error:
        raise LazymergeError(f"reading {error.filename or folder}: {error.strerror}") from error
    return Stale(**{kind: tuple(names) for kind, names in found.items()}, checksums=checksums)


def tell_edited(stale: Stale, observer: Observer) -> None:
    """Names what stays though it would be written otherwise now."""
    if stale.edited:
        observer.noted(
            f"{_some(stale.edited)} would be written otherwise now, and stays: somebody has edited "
            "it"
        )


def _title(document: Mapping[str, Any], folder: Path) -> str:
    """The output's name when it was written: an output that was moved keeps its model card."""
    name = document.get("name")
    return name if isinstance(name, str) else folder.absolute().name


def _being_written(folder: Path) -> frozenset[str]:
    """Names of small files that a run was writing anew: whatever they hold, it is ours."""
    try:
        document = read_document(folder / REWRITING_PATH)
    except InputError:
        return frozenset()
    names = document.get("files")
    if not isinstance(names, list):
        return frozenset()
    return frozenset(name for name in names if isinstance(name, str))


def bring_up_to_date(
    plan: Plan, document: Mapping[str, Any], folder: Path, observer: Observer, *, fsync: bool
) -> None:
    """Writes the small files of a complete output that are stale, and says so in its manifest. What
    somebody has edited stays as it is. Its lock is held.

    A run that is killed in the middle of it leaves a list of what it was writing, so that the next
    one does not take it for somebody's.

    Raises:
        InputError: the manifest is damaged.
        LazymergeError: a file cannot be read, written, or fetched from the Hub.
    """
    stale = stale_files(plan, document, folder)
    tell_edited(stale, observer)
    if not stale.asks_for_work:
        return
    name = _title(document, folder)
    try:
        needed = [file for file in plan.missing_files if file.name in stale.written]
        if needed:
            download(needed, plan.checkpoints.values())
        (folder / OWN_FOLDER).mkdir(exist_ok=True)
        being_written = {"files": [*stale.written, *stale.removed, *_being_written(folder)]}
        write_document(folder / REWRITING_PATH, being_written, fsync=fsync)
        if fsync:
            sync_folder(folder / OWN_FOLDER)
            sync_folder(folder)
        write_beside_weights(plan, folder, name, fsync=fsync, only=stale.written)
        for gone in stale.removed:
            (folder / gone).unlink(missing_ok=True)
        sums = {**stale.checksums}
        sums |= {written: file_checksum(folder / written) for written in stale.written}
        sums |= {kept: document["files"][kept] for kept in stale.edited if kept in sums}
        now = {**document, **beginning_of_manifest(plan), "name": name, "files": sums}
        now.pop("format")
        write_document(folder / MANIFEST_NAME, now, fsync=fsync)
        if fsync:
            sync_folder(folder)
        (folder / REWRITING_PATH).unlink()
    except OSError as error:
        raise write_error(Path(error.filename or folder), error) from error
    if stale.written:
        observer.noted(
            f"{_some(stale.written)} written anew: missing, or changed where it comes from"
        )
    if stale.removed:
        observer.noted(f"{_some(stale.removed)} removed: not there any more where it comes from")


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
