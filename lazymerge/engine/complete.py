"""Outputs that are complete already: recognised, tidied up, and their small files kept true.

A plan's fingerprint covers the weights, which are the work. The small files beside them may change
without it: a tokenizer file of the base model, a line of its config, a comment of the recipe; or
somebody has removed the model card. They are then written anew, and nothing is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from ..errors import InputError, LazymergeError
from ..output.checksum import file_checksum
from ..output.folder import OWN_FOLDER, REPLACED_PATH, is_unfinished
from ..output.journal import JOURNAL_PATH
from ..output.lock import OutputLock
from ..output.manifest import MANIFEST_NAME, MERGE_PATH, read_document, write_document
from ..output.writer import PARTIAL_SUFFIX, sync_folder, write_error
from .download import download
from .finishing import beside_weights, faults, write_beside_weights
from .plan import Plan
from .report import Observer
from .unfinished import check_hashes, content_hashes

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
    for path in (JOURNAL_PATH, MERGE_PATH + PARTIAL_SUFFIX, MERGE_PATH, REPLACED_PATH):
        with suppress(OSError):  # it is complete all the same
            (folder / path).unlink()


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


def nonfinite_error(tensor: str) -> str:
    return (
        f"tensor {tensor} of the merge holds inf or nan; look for it in the inputs "
        "(or for a parameter that makes it), or leave --strict out"
    )


def stale_files(plan: Plan, document: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Names of the small files of a complete output that are missing, or would be others now.

    Raises:
        InputError: the manifest is damaged.
        LazymergeError: one cannot be read.
    """
    recorded = document.get("files")
    if not isinstance(recorded, dict):
        raise InputError(f"{folder / MANIFEST_NAME} is damaged: its files are no mapping")
    absent = {(file.source.folder, file.name) for file in plan.missing_files}
    stale = []
    for name, content in beside_weights(plan, folder):
        try:
            if not (folder / name).is_file():
                stale.append(name)
            elif isinstance(content, bytes):
                if xxh3_128_hexdigest(content) != recorded.get(name):
                    stale.append(name)
            elif (plan.sidecar_folder, name) in absent:
                pass  # of the Hub: its commit says that it is what it was
            elif file_checksum(content) != recorded.get(name):
                stale.append(name)
        except OSError as error:
            raise LazymergeError(f"reading {error.filename or name}: {error.strerror}") from error
    return tuple(stale)


def bring_up_to_date(
    plan: Plan, document: Mapping[str, Any], folder: Path, observer: Observer, *, fsync: bool
) -> None:
    """Writes the small files of a complete output that are stale, and says so in its manifest. What
    somebody has edited stays as it is. Its lock is held.

    Raises:
        InputError: the manifest is damaged.
        LazymergeError: a file cannot be read, written, or fetched from the Hub.
    """
    recorded = document["files"]
    written: list[str] = []
    edited: list[str] = []
    try:
        for name in stale_files(plan, document, folder):
            path = folder / name
            is_edited = path.is_file() and file_checksum(path) != recorded.get(name)
            (edited if is_edited else written).append(name)
        if written:
            needed = [file for file in plan.missing_files if file.name in written]
            if needed:
                download(needed, plan.checkpoints.values())
            write_beside_weights(plan, folder, fsync=fsync, only=written)
            kept = {
                name: recorded[name] for name, _ in beside_weights(plan, folder) if name in recorded
            }
            sums = {name: file_checksum(folder / name) for name in written}
            now = {**document, "recipe": plan.recipe_dict(), "files": {**kept, **sums}}
            now.pop("format")
            write_document(folder / MANIFEST_NAME, now, fsync=fsync)
            if fsync:
                sync_folder(folder)
    except OSError as error:
        raise write_error(Path(error.filename or folder), error) from error
    if written:
        observer.noted(f"{_some(written)} written anew: missing, or changed where it comes from")
    if edited:
        observer.noted(
            f"{_some(edited)} would be written otherwise now, and stays: somebody has edited it"
        )


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
