"""The output folder: what may be there before a run, and what is left when one fails."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import DoesNotFitError, InputError
from ..sizes import format_bytes
from .journal import JOURNAL_PATH
from .layout import INDEX_NAME
from .lock import LOCK_PATH, MOVED_PATTERN
from .manifest import MANIFEST_NAME, MERGE_PATH, STATISTICS_NAME
from .sidecars import COPIED
from .writer import PARTIAL_SUFFIX, sync_folder

OWN_FILES = (
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    INDEX_NAME,
    "config.json",
    "README.md",
    MANIFEST_NAME,
    STATISTICS_NAME,
    *COPIED,
)
"""What --overwrite may remove from an earlier output, under these names or as partial files.
Anything else is somebody's and stays."""

OWN_FOLDER = ".lazymerge"
"""What a run keeps in the output while it is not complete."""

REPLACED_PATH = f"{OWN_FOLDER}/replaced"
"""Says, while an earlier output is being removed, that what is left of it is lazymerge's."""

REWRITING_PATH = f"{OWN_FOLDER}/rewriting"
"""Names, while small files of a complete output are written anew, which ones."""

CLUSTER_PATTERN = "cluster-*"
"""What shows a cluster's workers that a folder is the one that their run writes."""

OWN_FOLDERS = {
    OWN_FOLDER: (
        "plan.json",
        "plan.json" + PARTIAL_SUFFIX,
        *(Path(path).name for path in (JOURNAL_PATH, LOCK_PATH, MERGE_PATH, REPLACED_PATH)),
        Path(MERGE_PATH).name + PARTIAL_SUFFIX,
        Path(REWRITING_PATH).name,
        Path(REWRITING_PATH).name + PARTIAL_SUFFIX,
        MOVED_PATTERN,
        CLUSTER_PATTERN,
    ),
    "1_Pooling": ("config.json", "config.json" + PARTIAL_SUFFIX),
}
"""Folders in an output, and patterns of the files in them, that --overwrite may remove."""

PLAN_PATH = f"{OWN_FOLDER}/plan.json"
"""Where `lazymerge plan -o OUT` leaves the plan; a folder that holds nothing else is empty."""

FILESYSTEM_SLACK_BYTES = 16 << 20
"""Room for the folder's own blocks and the small files beside the weights."""


def is_own(entry: Path) -> bool:
    """Whether something in an output folder is what a merge writes there.

    A folder is when there is nothing in it but files that a merge writes.
    """
    if entry.is_dir() and not entry.is_symlink():
        patterns = OWN_FOLDERS.get(entry.name)
        return patterns is not None and all(
            any(fnmatch.fnmatchcase(child.name, pattern) for pattern in patterns)
            and (child.is_symlink() or child.is_file())
            for child in entry.iterdir()
        )
    return is_own_name(entry.name)


def is_own_name(name: str) -> bool:
    """Whether it is that of a file in an output folder that a merge writes, or of its partial."""
    name = name.removesuffix(PARTIAL_SUFFIX)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in OWN_FILES)


def is_unfinished(output: Path) -> bool:
    """Whether a run has begun to write here and is not complete."""
    return (output / MERGE_PATH).is_file() and not _has_manifest(output)


def _has_manifest(output: Path) -> bool:
    """An empty one is none: that is what a power failure may leave of a run that did not sync."""
    path = output / MANIFEST_NAME
    return path.is_file() and path.stat().st_size > 0


def check_output_folder(
    output: Path, inputs: Sequence[str], *, overwrite: bool, resumes: bool = False
) -> None:
    """Checks that a run may write here; changes nothing.

    inputs: folders of the models, absolute.
    resumes: it may hold what an unfinished run has left.

    Raises:
        InputError: it is a model's folder, no folder at all, or not empty.
    """
    resolved = os.path.realpath(output)
    for folder in inputs:
        if resolved == os.path.realpath(folder) or _is_same_folder(resolved, folder):
            raise InputError(
                f"the output folder {output} is the folder of an input model; choose another one"
            )
    if not output.exists():
        if output.is_symlink():
            raise InputError(
                f"the output {output} is a link to {os.readlink(output)}, which is absent; "
                "make that folder or choose another name"
            )
        _check_parent(output)
        return
    if not output.is_dir():
        raise InputError(f"the output {output} exists and is not a folder; choose another name")
    if not os.access(output, os.W_OK | os.X_OK):
        raise InputError(f"the output folder {output} is not writable")
    own = output / OWN_FOLDER
    if own.is_symlink() or (own.exists() and not own.is_dir()):
        raise InputError(f"{own} is no folder, and lazymerge did not make it; remove it")
    if resumes:
        _check_kinds(output)
        return
    entries = sorted(output.iterdir())
    present = [entry.name for entry in entries]
    foreign = [entry.name for entry in entries if not is_own(entry)]
    if present == [OWN_FOLDER] and not foreign and not is_unfinished(output):
        return
    is_earlier = any(
        name in (MANIFEST_NAME, OWN_FOLDER) or name.endswith(PARTIAL_SUFFIX) for name in present
    )
    if present and not overwrite:
        raise InputError(
            f"the output folder {output} is not empty (it holds {_some(present)}); old and new "
            "weights must not mix: choose an empty folder, or give --overwrite to replace an "
            "earlier output"
        )
    if present and not is_earlier:
        raise InputError(
            f"the output folder {output} holds files ({_some(present)}) and no {MANIFEST_NAME}, so "
            "it is not an earlier output of lazymerge, and --overwrite does not replace it; choose "
            "another folder"
        )
    if foreign:
        raise InputError(
            f"the output folder {output} holds files that no merge has written ({_some(foreign)}); "
            "--overwrite does not remove those: choose another folder or move them away"
        )


def _check_kinds(output: Path) -> None:
    """Raises:
    InputError: a folder, a link or a pipe stands where a run writes a file of its own.
    """
    names = [JOURNAL_PATH, MERGE_PATH]
    names += [LOCK_PATH] * (output / LOCK_PATH).is_dir()  # links and pipes are taken away later
    names += [entry.name for entry in sorted(output.iterdir()) if is_own_name(entry.name)]
    for path in (output / name for name in names):
        is_strange = path.is_symlink() if path.parent.name == OWN_FOLDER else path.is_dir()
        if os.path.lexists(path) and (is_strange or not (path.is_file() or path.is_symlink())):
            raise InputError(
                f"{path} is no regular file, and no merge has made it; move it away, or choose "
                "another output folder"
            )


def _is_same_folder(first: str, second: str) -> bool:
    """Whether two paths lead to one folder: by links, or by mounts of it at two places."""
    with suppress(OSError):
        return os.path.samefile(first, second)
    return False


def check_disk(output: Path, needed_bytes: int, *, overwrite: bool) -> None:
    """Checks that the output fits on its filesystem.

    Raises:
        DoesNotFitError: it does not.
    """
    check_disks([(output, needed_bytes)], overwrite=overwrite)


def check_disks(outputs: Sequence[tuple[Path, int]], *, overwrite: bool) -> None:
    """Checks that outputs, each with the bytes that it needs, fit on their filesystems together.

    Raises:
        DoesNotFitError: they do not.
    """
    by_filesystem: dict[int, list[tuple[Path, int]]] = {}
    for output, needed_bytes in outputs:
        device = _existing(output).stat().st_dev
        by_filesystem.setdefault(device, []).append((output, needed_bytes))
    for together in by_filesystem.values():
        output = together[0][0]
        needed_bytes = sum(needed for _, needed in together)
        free = free_disk_bytes(output)
        if overwrite:
            free += sum(_own_bytes(folder) for folder, _ in together)
        if needed_bytes + len(together) * FILESYSTEM_SLACK_BYTES > free:
            what = "the output needs" if len(together) == 1 else "the outputs need"
            raise DoesNotFitError(
                f"{what} {format_bytes(needed_bytes)} on disk, and {output} has "
                f"{format_bytes(free)} free; free some space or choose another output folder"
            )


def _own_bytes(output: Path) -> int:
    """What an earlier merge in a folder occupies, and --overwrite sets free."""
    if not output.is_dir():
        return 0
    return sum(
        entry.stat().st_blocks * 512
        for entry in output.iterdir()
        if entry.is_file() and is_own(entry)
    )


def _existing(output: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    existing = output.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def free_disk_bytes(output: Path) -> int:
    """Free bytes on the filesystem where a folder is or would be."""
    return shutil.disk_usage(_existing(output)).free


def clear_output_folder(output: Path, *, fsync: bool = False) -> None:
    """Creates the folder if need be, and removes what an earlier merge has left in it.

    fsync: whatever happens to the machine: nothing is gone from disk while the manifest is there.

    The lock stays. What says that an earlier output is complete goes first, and what says that the
    folder is lazymerge's goes last, so that whoever comes upon a half removed output may go on.
    """
    output.mkdir(parents=True, exist_ok=True)
    own = output / OWN_FOLDER
    entries = [entry for entry in output.iterdir() if is_own(entry)]
    if any(entry != own for entry in entries) and (own in entries or not os.path.lexists(own)):
        _mark_as_replaced(output, fsync=fsync)
    if (output / MANIFEST_NAME).exists():
        (output / MANIFEST_NAME).unlink()
        if fsync:
            sync_folder(output)
    for entry in entries:
        if entry != own:
            _remove(entry)
    if fsync:
        sync_folder(output)
    if own.is_dir() and is_own(own):
        _remove(own, stays=output / LOCK_PATH, last=output / REPLACED_PATH)


def _mark_as_replaced(output: Path, *, fsync: bool) -> None:
    marker = output / REPLACED_PATH
    marker.parent.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    if fsync:
        sync_folder(marker.parent)
        sync_folder(output)


def _remove(entry: Path, *, stays: Path | None = None, last: Path | None = None) -> None:
    """Removes a file, or a folder and the files in it.

    stays: a file that is left. last: a file that is removed after all others.
    """
    if not entry.is_dir() or entry.is_symlink():
        entry.unlink(missing_ok=True)
        return
    for child in sorted(entry.iterdir(), key=lambda child: child == last):
        if child != stays:
            child.unlink(missing_ok=True)
    with suppress(OSError):  # it holds what stays
        entry.rmdir()


def _check_parent(output: Path) -> None:
    existing = output.absolute().parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"the output {output} cannot be made: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"the output {output} cannot be made: {existing} is not writable")


def _some(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
