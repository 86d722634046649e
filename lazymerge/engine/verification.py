"""Checking a complete output: its bytes against its manifest, and against its inputs.

verify                  every tensor is read and its checksum formed anew
verify --recompute N    N tensors, drawn at random, are merged again from the inputs
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from ..checkpoint import is_plain_name, read_header
from ..checkpoint.tensor import DTYPES, TensorInfo
from ..errors import InputError, brief
from ..output.checksum import file_checksum, tensor_checksum
from ..output.layout import OutputTensor, lay_out
from ..output.manifest import CHECKSUM, MANIFEST_NAME, read_document
from .finishing import faults
from .plan import Plan
from .resources import Resources
from .run import run_plan
from .unfinished import plan_again


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of a check.

    tensors, bytes: that were read.
    problems: one line each; none if all is as the manifest says.
    edited: small files (config, model card and the like) that are not as they were written, which
        is no fault: people may edit them.
    recomputed: names of the tensors that were merged again.
    seed: that they were drawn by.
    """

    tensors: int
    bytes: int
    problems: tuple[str, ...]
    edited: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    seed: int | None = None


Checked = Callable[[int, str], None]
"""Told after every tensor: its bytes, its name."""


def verify_output(
    output: Path | str,
    *,
    recompute: int = 0,
    seed: int | None = None,
    resources: Resources | None = None,
    checked: Checked | None = None,
) -> Verification:
    """Reads a complete output and compares it with its manifest.

    recompute: how many tensors to merge again from the inputs; more than there are: all.
    seed: which ones; None: drawn anew.

    Raises:
        InputError: it is no complete output, its manifest is damaged, or (to recompute) its inputs
            are not what they were.
        DoesNotFitError: there is no room for what is merged again.
        LazymergeError: a file cannot be read.
    """
    folder = Path(output)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError(
            f"{output} has no {MANIFEST_NAME}: it is no complete output of lazymerge "
            "(lazymerge status tells how far one is)"
        )
    manifest = read_document(path)
    entries = entries_of(manifest, path)
    problems = faults(manifest, folder)
    if sum(entry.size_bytes for entry in entries.values()) != manifest["output"].get("bytes"):
        problems.append(f"{path} does not list all bytes")
    size = 0
    for file in sorted({entry.file for entry in entries.values()}):
        of_file = {name: entry for name, entry in entries.items() if entry.file == file}
        if not (folder / file).is_file():
            continue  # it has been said
        size += _check_file(folder / file, of_file, problems, checked or (lambda *_: None))
    drawn: tuple[str, ...] = ()
    if recompute > 0:
        seed = Random().getrandbits(32) if seed is None else seed
        names = sorted(entries)
        drawn = tuple(Random(seed).sample(names, min(recompute, len(names))))
        problems += merged_again(manifest, path, drawn, entries, resources or Resources())
    edited = _edited(manifest["files"], folder)
    return Verification(len(entries), size, tuple(problems), edited, drawn, seed)


def _edited(files: dict[str, str], folder: Path) -> tuple[str, ...]:
    """Names of the small files whose contents are not what was written.

    files: their checksums, by name.
    """
    edited = []
    for name, checksum in files.items():
        with suppress(OSError):  # one that is missing is a fault, and has been said
            if (folder / name).is_file() and file_checksum(folder / name) != checksum:
                edited.append(name)
    return tuple(edited)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor, as a manifest has it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    span_elements: int
    checksum: str

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].item_bytes

    @property
    def span_bytes(self) -> int:
        """Length of the spans that its checksum is made of."""
        return self.span_elements * DTYPES[self.dtype].item_bytes


def entries_of(manifest: Mapping[str, Any], where: Path | str) -> dict[str, Entry]:
    """A manifest's tensors, by name. where: it is.

    Raises:
        InputError: it is damaged.
    """
    try:
        if manifest["checksum"] != CHECKSUM:
            raise ValueError("its checksums are of another kind")
        return {name: _entry(entry) for name, entry in manifest["tensors"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where} is damaged ({brief(error)})") from error


def _entry(entry: Any) -> Entry:
    file, dtype, checksum = entry["file"], entry["dtype"], entry["checksum"]
    shape, span = entry["shape"], entry["span_elements"]
    if not all(isinstance(text, str) for text in (file, dtype, checksum)) or dtype not in DTYPES:
        raise TypeError("a tensor's entry")
    if not is_plain_name(file):
        raise ValueError(f"file {file[:80]!r}")
    numbers = [*shape, span]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers) or not span or len(shape) > 64:
        raise TypeError("a tensor's entry")
    return Entry(file, dtype, tuple(shape), span, checksum)


def _check_file(
    path: Path, entries: dict[str, Entry], problems: list[str], checked: Checked
) -> int:
    """Compares one shard's tensors; returns the bytes read."""
    try:
        found = {tensor.name: tensor for tensor in read_header(path).tensors}
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (InputError, OSError) as error:
        problems.append(str(error))
        return 0
    problems += [
        f"{path}: tensor {name} is not in the manifest" for name in found if name not in entries
    ]
    size = 0
    try:
        for name, entry in entries.items():
            problem = _check_tensor(descriptor, found.get(name), entry)
            if problem:
                problems.append(f"{path}: tensor {name} {problem}")
            elif name in found:
                size += found[name].size_bytes
                checked(found[name].size_bytes, name)
    finally:
        os.close(descriptor)
    return size


def _check_tensor(descriptor: int, found: TensorInfo | None, entry: Entry) -> str | None:
    if found is None or not is_like(found, entry):
        return unlike(found, entry)
    try:
        checksum = tensor_checksum(descriptor, found.start, found.stop_exclusive, entry.span_bytes)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if checksum == entry.checksum else "has other bytes than were written"


def is_like(found: TensorInfo, entry: Entry) -> bool:
    """Whether a tensor is of the dtype and shape that the manifest says."""
    return (found.dtype, found.shape) == (entry.dtype, entry.shape)


def unlike(found: TensorInfo | None, entry: Entry) -> str:
    """What is wrong with one that is not."""
    if found is None:
        return "is missing"
    return (
        f"is {found.dtype} of shape {list(found.shape)}, "
        f"the manifest says {entry.dtype} of shape {list(entry.shape)}"
    )


def merged_again(
    manifest: dict[str, Any],
    where: Path | str,
    names: Collection[str],
    entries: Mapping[str, Entry],
    resources: Resources,
) -> list[str]:
    """Merges some tensors again; one sentence for each that comes out otherwise.

    manifest: of the output. where: it is.

    Raises as verify_output.
    """
    whole = plan_again(manifest, where, resources)
    if {tensor.name for tensor in whole.tensors} != entries.keys():
        raise InputError(f"{where} is damaged: its tensors are not those of its recipe")
    plan = part_of_plan(whole, names)
    with tempfile.TemporaryDirectory(prefix="lazymerge-verify-") as folder:
        run_plan(plan, folder, fsync=False)
        again = read_document(Path(folder) / MANIFEST_NAME)["tensors"]
    return [
        f"tensor {name} comes out otherwise when it is merged again"
        for name in names
        if again[name]["checksum"] != entries[name].checksum
    ]


def part_of_plan(plan: Plan, names: Collection[str]) -> Plan:
    """The same merge, of some of its tensors only."""
    graph = plan.graph.only([write.id for write in plan.graph.writes if write.name in names])
    outputs = [OutputTensor(w.name, w.dtype, w.shape) for w in graph.writes]
    size = sum(tensor.size_bytes for tensor in outputs)
    return replace(
        plan,
        graph=graph,
        tensors=tuple(tensor for tensor in plan.tensors if tensor.name in names),
        shards=lay_out(outputs, size),
        max_shard_bytes=size,
        config=None,
        sidecars=(),
        tokenizer=None,
    )
