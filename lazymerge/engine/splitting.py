"""A merge in parts that machines run apart from each other, and joining them.

    OUT/part-1-of-3.json     ─ lazymerge run ─►  OUT/part-1-of-3/   some of the shards, complete
    OUT/part-2-of-3.json     ─ lazymerge run ─►  OUT/part-2-of-3/
    OUT/part-3-of-3.json     ─ lazymerge run ─►  OUT/part-3-of-3/
                                     lazymerge join OUT  ─►  OUT/   as one run would have left it

A part is some shards of the whole, under their names in the whole. It is an output like any other,
with a journal, a lock and a manifest: it is resumed, looked at and verified alone. A part's file
says of what merge it is, and who runs it plans that merge again: operations, inputs and versions
have to give the same fingerprint everywhere.

Joining moves shards, which takes no time on one filesystem. It may be killed anywhere: the parts'
manifests stay until the whole has its own.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, LazymergeError, brief
from ..output.checksum import file_checksum
from ..output.folder import OWN_FOLDER
from ..output.layout import Shard
from ..output.lock import OutputLock
from ..output.manifest import (
    CHECKSUM,
    MANIFEST_NAME,
    STATISTICS_NAME,
    read_document,
    write_document,
)
from ..output.writer import sync_file, sync_folder, write_error
from .complete import tidy_up
from .finishing import faults, write_beside_weights
from .plan import Plan, Split
from .resources import Resources
from .stages import TensorTask, bytes_read
from .statistics import load_statistics
from .statistics_file import join_statistics
from .unfinished import beginning_of_manifest, plan_again

PART_NAME = re.compile(r"part-(\d+)-of-(\d+)(\.json)?")

MOST_PARTS = 10_000


def split_plan(plan: Plan, count: int) -> tuple[Plan, ...]:
    """The plan in parts of about equal work, bytes read and written; each some of its shards.

    count: of parts.

    Raises:
        InputError: there are fewer shards than parts.
    """
    if not 0 < count <= MOST_PARTS:
        raise InputError(f"--split {count}: a merge has 1 to {MOST_PARTS} parts")
    if count > len(plan.shards):
        size = max(1, plan.bytes_written // (2 * count))
        raise InputError(
            f"--split {count}: the output has {len(plan.shards)} "
            f"{'shard' if len(plan.shards) == 1 else 'shards'}, and a part is at least one; give "
            f"--max-shard-size {size} or less, or split it into fewer parts"
        )
    whole = plan.fingerprint
    parts = _balanced(plan.shards, work_bytes(plan, plan.tasks), count)
    return tuple(
        _part(plan, shards, Split(number, count, whole)) for number, shards in enumerate(parts, 1)
    )


def part_of(plan: Plan, split: Split) -> Plan:
    """One part of a whole plan.

    Raises:
        InputError: it cannot be split so.
    """
    if not 0 < split.number <= split.count:
        raise InputError(f"there is no part {split.number} of {split.count}")
    return split_plan(plan, split.count)[split.number - 1]


def work_bytes(plan: Plan, tasks: Iterable[TensorTask]) -> dict[str, int]:
    """Bytes that output tensors read, in all expected passes, and write, by name."""
    sizes = {tensor.name: tensor.size_bytes for s in plan.shards for tensor in s.tensors}
    return {
        task.write.name: sizes[task.write.name] + bytes_read(plan.graph, task) for task in tasks
    }


def _balanced(
    shards: Sequence[Shard], work: Mapping[str, int], count: int
) -> list[tuple[Shard, ...]]:
    """The shards in so many groups: the largest first, each to the group that has least."""
    sizes = [sum(work[tensor.name] for tensor in shard.tensors) for shard in shards]
    groups: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for place in sorted(range(len(shards)), key=lambda place: (-sizes[place], place)):
        least = min(range(count), key=lambda group: (filled[group], len(groups[group]), group))
        groups[least].append(place)
        filled[least] += sizes[place]
    return [tuple(shards[place] for place in sorted(group)) for group in groups]


def _part(plan: Plan, shards: tuple[Shard, ...], split: Split) -> Plan:
    names = {tensor.name for shard in shards for tensor in shard.tensors}
    graph = plan.graph.only([write.id for write in plan.graph.writes if write.name in names])
    part = replace(
        plan,
        graph=graph,
        tensors=tuple(tensor for tensor in plan.tensors if tensor.name in names),
        shards=shards,
        config=None,
        sidecars=(),
        notices=(),
        split=split,
    )
    return part.with_resources(plan.resources)


def part_name(split: Split) -> str:
    return f"part-{split.number}-of-{split.count}"


def write_parts(plan: Plan, folder: Path, count: int) -> list[Path]:
    """Writes a file for each part into a folder; returns their paths.

    Raises:
        InputError: the merge has fewer shards, or the folder holds something else.
        LazymergeError: a file cannot be written.
    """
    parts = split_plan(plan, count)
    strange = [e.name for e in _entries(folder) if not PART_NAME.fullmatch(e.name)]
    if strange:
        raise InputError(
            f"{folder} is to hold the parts of a merge, and holds {strange[0]}; choose another one"
        )
    for entry in _entries(folder):
        if entry.is_dir():
            raise InputError(
                f"{folder} holds parts of a merge that have been run ({entry.name}); join them, "
                "remove them or choose another folder"
            )
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in _entries(folder):
            entry.unlink()
        for part in parts:
            assert part.split is not None
            path = folder / f"{part_name(part.split)}.json"
            write_document(path, beginning_of_manifest(part), fsync=True)
            paths.append(path)
    except OSError as error:
        raise write_error(Path(error.filename or folder), error) from error
    return paths


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Joined:
    """What joining has made. output: the folder, absolute. parts: how many there were; 0: it was
    complete."""

    output: str
    parts: int
    tensors: int
    bytes_written: int


def join_parts(folder: Path, *, fsync: bool = True) -> Joined:
    """Makes one output of the parts that lie in its folder.

    Raises:
        InputError: a part is missing, is not complete, or is of another merge; all that are wrong
            are named.
        LazymergeError: a file cannot be moved or written.
    """
    found = _parts_in(folder)
    if not found:
        whole = _complete_whole(folder, {})
        if whole is not None:
            tidy_up(folder)
            return whole
        raise InputError(
            f"{folder} holds no parts of a merge; make them with: lazymerge plan RECIPE -o "
            f"{folder} --split N"
        )
    lock = OutputLock(folder)
    try:
        whole = _complete_whole(folder, found)
        if whole is not None:
            _remove_parts(folder)
            return whole
        documents = _complete_parts(folder, found)
        first = next(iter(documents.values()))
        plan = plan_again(_as_whole(first), found[1] / MANIFEST_NAME, Resources())
        if plan.fingerprint != first["split"]["whole"]:
            raise InputError(f"{folder} holds parts of another merge than their recipe gives now")
        _check_statistics(found.values())
        _move(plan, folder, found, fsync=fsync)
        join_statistics(plan, folder, found.values(), fsync=fsync)
        document = _manifest(plan, folder, documents, fsync=fsync)
        write_document(folder / MANIFEST_NAME, document, fsync=fsync)
        if fsync:
            sync_folder(folder)
        _remove_parts(folder)
    except OSError as error:
        raise write_error(Path(error.filename or folder), error) from error
    finally:
        lock.release()
    with suppress(OSError):
        (folder / OWN_FOLDER).rmdir()
    return Joined(str(folder.absolute()), len(found), len(plan.tensors), plan.bytes_written)


def _check_statistics(parts: Iterable[Path]) -> None:
    """Checks, before anything is moved, that what parts have gathered can be read.

    Raises:
        InputError: it is damaged.
    """
    for part in parts:
        path = part / STATISTICS_NAME
        if path.is_file():
            try:
                load_statistics(part)
            except InputError as error:
                raise InputError(f"{error}\nto join without it: remove {path}") from error


def _complete_whole(folder: Path, found: Mapping[int, Path]) -> Joined | None:
    """What an earlier run has joined before it was killed: only parts' remains were left to go."""
    with suppress(InputError, KeyError, TypeError):
        document = read_document(folder / MANIFEST_NAME)
        for path in found.values():
            if (path / MANIFEST_NAME).is_file():
                part = read_document(path / MANIFEST_NAME)
                if part["split"]["whole"] != document["fingerprint"]:
                    return None
        if not faults(document, folder):
            facts = document["output"]
            size = sum(document["shards"].values())
            return Joined(str(folder.absolute()), len(found), facts["tensors"], size)
    return None


def _parts_in(folder: Path) -> dict[int, Path]:
    """Folders of parts, by number; of those that were not begun too.

    Raises:
        InputError: they are of divisions into different numbers of parts.
    """
    numbers: dict[int, Path] = {}
    counts: set[int] = set()
    for entry in _entries(folder):
        match = PART_NAME.fullmatch(entry.name)
        if match is None or len(match[1]) > 5 or len(match[2]) > 5:
            continue
        numbers[int(match[1])] = folder / entry.name.removesuffix(".json")
        counts.add(int(match[2]))
    if len(counts) > 1:
        several = ", ".join(map(str, sorted(counts)))
        raise InputError(
            f"{folder} holds parts of divisions into {several}; remove those that are not wanted"
        )
    if not counts:
        return {}
    (count,) = counts
    for number in range(1, min(count, MOST_PARTS) + 1):
        numbers.setdefault(number, folder / f"part-{number}-of-{count}")
    return dict(sorted(numbers.items()))


def _complete_parts(folder: Path, found: Mapping[int, Path]) -> dict[int, dict[str, Any]]:
    """The manifests of all parts.

    Raises:
        InputError: some are not complete, or not of one merge.
    """
    problems: list[str] = []
    documents: dict[int, dict[str, Any]] = {}
    for number, path in found.items():
        run = f"lazymerge run {path}.json -o {path}"
        if not (path / MANIFEST_NAME).is_file():
            state = "is not complete" if path.is_dir() else "has not been run"
            problems.append(f"{path} {state}: {run}")
            continue
        try:
            document = read_document(path / MANIFEST_NAME)
            split = document["split"]
            if (split["number"], split["count"]) != (number, len(found)):
                raise InputError(f"{path} holds part {split['number']} of {split['count']}")
            problems += _missing(document, path, folder)
            documents[number] = document
        except InputError as error:
            problems.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{path / MANIFEST_NAME} is no part's ({brief(error)})")
    wholes = {str(document["split"].get("whole")) for document in documents.values()}
    if len(wholes) > 1:
        problems.append(f"{folder} holds parts of different merges")
    if problems:
        raise InputError("\n".join(problems))
    return documents


def _missing(document: Mapping[str, Any], path: Path, folder: Path) -> list[str]:
    """What of a part's shards is neither there nor in the whole's folder already."""
    moved = {
        name: size
        for name, size in document["shards"].items()
        if not (path / name).exists()
        and (folder / name).is_file()
        and (folder / name).stat().st_size == size
    }
    left = {name: size for name, size in document["shards"].items() if name not in moved}
    if not moved:
        return faults(document, path)
    return [
        f"{path / name} is missing, or not as long as its manifest says"
        for name, size in left.items()
        if not (path / name).is_file() or (path / name).stat().st_size != size
    ]


def _as_whole(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of the whole would begin with, as far as planning it again needs it."""
    split = document["split"]
    return {
        **{key: value for key, value in document.items() if key != "split"},
        "fingerprint": split["whole"],
    }


def _move(plan: Plan, folder: Path, found: Mapping[int, Path], *, fsync: bool) -> None:
    """Brings every shard into the whole's folder, under its name."""
    places = {
        shard.file: path / shard.file
        for path in found.values()
        for shard in plan.shards
        if (path / shard.file).is_file()
    }
    for shard in plan.shards:
        target = folder / shard.file
        source = places.get(shard.file)
        if source is None:
            if not target.is_file() or target.stat().st_size != shard.size_bytes:
                raise InputError(f"none of the parts holds {shard.file}")
            continue
        try:
            source.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            partial = folder / f"{shard.file}.partial"
            shutil.copyfile(source, partial)
            partial.rename(target)
            if fsync:
                sync_file(target)
                sync_folder(folder)
            source.unlink()
    if fsync:
        sync_folder(folder)


def _manifest(
    plan: Plan, folder: Path, documents: Mapping[int, Mapping[str, Any]], *, fsync: bool
) -> dict[str, Any]:
    """The manifest of the whole, put together from those of its parts."""
    beside = write_beside_weights(plan, folder, folder.absolute().name, fsync=fsync)
    tensors: dict[str, Any] = {}
    nonfinite: list[Any] = []
    runs = []
    for document in documents.values():
        tensors |= document["tensors"]
        nonfinite += document["nonfinite"]
        runs.append(document["run"])
    order = [tensor.name for shard in plan.shards for tensor in shard.tensors]
    if set(order) != tensors.keys():
        raise LazymergeError(f"the parts in {folder} do not hold the tensors of the merge")
    beginning = beginning_of_manifest(plan)
    hashes = [d["input_checksums"] for d in documents.values() if "input_checksums" in d]
    if hashes:
        beginning["input_checksums"] = {k: v for sums in hashes for k, v in sums.items()}
    return {
        **beginning,
        "name": folder.absolute().name,
        "memory": {
            **plan.memory.as_dict(),
            "measured_bytes": max(d["memory"]["measured_bytes"] for d in documents.values()),
            "measured_vram_bytes": None,
        },
        "nonfinite": nonfinite,
        "device_name": next(iter(documents.values())).get("device_name"),
        "run": {
            "seconds": max(run["seconds"] for run in runs),
            "bytes_read": sum(run["bytes_read"] for run in runs),
            "bytes_written": sum(run["bytes_written"] for run in runs),
            "resumed_tensors": sum(run["resumed_tensors"] for run in runs),
            "parts": len(runs),
        },
        "shards": {shard.file: shard.size_bytes for shard in plan.shards},
        "files": {name: file_checksum(folder / name) for name in beside},
        "checksum": CHECKSUM,
        "tensors": {name: tensors[name] for name in order},
    }


def _remove_parts(folder: Path) -> None:
    """What is left of parts when the whole is there: manifests and the parts' own files."""
    for entry in list(_leftovers(folder)):
        with suppress(OSError):  # the output is complete all the same
            entry.unlink()
    for entry in _entries(folder):
        if PART_NAME.fullmatch(entry.name):
            for inner in (entry / OWN_FOLDER, entry):
                with suppress(OSError):
                    os.rmdir(inner)


def _leftovers(folder: Path) -> Iterator[Path]:
    for entry in _entries(folder):
        match = PART_NAME.fullmatch(entry.name)
        if match is None:
            continue
        if match[3]:
            yield entry
        elif (entry / MANIFEST_NAME).is_file():
            yield entry / STATISTICS_NAME
            yield entry / MANIFEST_NAME
