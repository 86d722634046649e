"""Checking an output in a store: its objects are read by ranges, several tensors at a time, and
nothing of them is kept."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

from xxhash import xxh3_128, xxh3_128_hexdigest

from ...checkpoint.header import FIRST_READ_BYTES, parse_header
from ...checkpoint.tensor import TensorInfo
from ...errors import InputError
from ...output.layout import Shard
from ...output.manifest import MANIFEST_NAME, count
from ...output.store.address import StoreAddress
from ...output.store.client import Store, StoredObject
from ...output.store.reading import StoredFile
from ...output.store.records import ShardRecord, StoreContents, is_own_object, look
from ...output.store.uploads import MOST_UPLOADS
from ..finishing import span_elements
from ..plan import Plan
from ..resources import Resources
from ..verification import (
    Checked,
    Entry,
    Verification,
    entries_of,
    is_like,
    merged_again,
    unlike,
)

READS_AT_ONCE = MOST_UPLOADS


def verify_in_store(
    address: StoreAddress,
    *,
    recompute: int = 0,
    seed: int | None = None,
    resources: Resources | None = None,
    checked: Checked | None = None,
) -> Verification:
    """As `verify_output`, of an output in a store."""
    store = Store(address)
    contents = look(store)
    document = contents.manifest
    if document is None:
        raise InputError(
            f"{address} has no {MANIFEST_NAME}: it is no complete output of lazymerge "
            "(lazymerge status tells how far one is)"
        )
    where = address.url(MANIFEST_NAME)
    entries = entries_of(document, where)
    problems = _faults(document, contents, address)
    if sum(entry.size_bytes for entry in entries.values()) != document["output"].get("bytes"):
        problems.append(f"{where} does not list all bytes")
    tell = checked or (lambda *_: None)
    for file in sorted({entry.file for entry in entries.values()}):
        if file in contents.objects:  # else it has been said
            of_file = {name: entry for name, entry in entries.items() if entry.file == file}
            problems += _check_object(store, contents.objects[file], of_file, tell)
    drawn: tuple[str, ...] = ()
    if recompute > 0:
        seed = Random().getrandbits(32) if seed is None else seed
        names = sorted(entries)
        drawn = tuple(Random(seed).sample(names, min(recompute, len(names))))
        problems += merged_again(document, where, drawn, entries, resources or Resources())
    size = sum(entry.size_bytes for entry in entries.values() if entry.file in contents.objects)
    edited = _edited(document["files"], store, contents)
    return Verification(len(entries), size, tuple(problems), edited, drawn, seed)


def shard_problems(plan: Plan, store: Store, record: ShardRecord) -> list[str]:
    """What is wrong with a shard that an earlier run has made; one sentence each."""
    shard = next(shard for shard in plan.shards if shard.file == record.file)
    found = StoredObject(record.file, record.size_bytes, record.etag)
    return _check_object(store, found, _entries(plan, shard, record), lambda *_: None)


def _entries(plan: Plan, shard: Shard, record: ShardRecord) -> dict[str, Entry]:
    names = {tensor.name: tensor for tensor in shard.tensors}
    return {
        write.name: Entry(
            shard.file,
            names[write.name].dtype,
            names[write.name].shape,
            span_elements(plan, write),
            record.tensors[write.name].checksum,
        )
        for write in plan.graph.writes
        if write.name in names
    }


def _faults(
    document: Mapping[str, Any], contents: StoreContents, address: StoreAddress
) -> list[str]:
    """What a look at the objects shows to be missing, or too short or long; one sentence each.

    Raises:
        InputError: the manifest is damaged.
    """
    where = address.url(MANIFEST_NAME)
    try:
        sizes = {name: count(size) for name, size in document["shards"].items()}
        files = {str(entry["file"]) for entry in document["tensors"].values()}
        names = [*sizes, *document["files"]]
        if not all(map(is_own_object, names)):
            raise ValueError("a name that no merge writes")
        is_unlike = document["output"]["tensors"] != len(document["tensors"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{where} is damaged") from None
    found = []
    if is_unlike or files != sizes.keys():
        found.append(f"{where} does not list all tensors and shards")
    for name in names:
        there = contents.objects.get(name)
        if there is None:
            found.append(f"{address.url(name)} is missing")
        elif there.size_bytes != sizes.get(name, there.size_bytes):
            found.append(
                f"{address.url(name)} holds {there.size_bytes:,} bytes, the manifest says "
                f"{sizes[name]:,}"
            )
    return found


def _check_object(
    store: Store, found: StoredObject, entries: Mapping[str, Entry], checked: Checked
) -> list[str]:
    """Compares one shard's tensors."""
    file, url = StoredFile(store, found), store.address.url(found.name)

    def start(length: int) -> bytes:
        data = bytearray()
        file.read(0, min(length, found.size_bytes), data.extend)
        return bytes(data)

    try:
        if found.size_bytes < min(FIRST_READ_BYTES, 8):
            raise InputError(f"{url}: holds {found.size_bytes} bytes, which is no shard")
        header = parse_header(start, found.size_bytes, found.name, url)
    except InputError as error:
        return [str(error)]
    there = {tensor.name: tensor for tensor in header.tensors}
    problems = [
        f"{url}: tensor {name} is not in the manifest" for name in there if name not in entries
    ]

    def check(name: str) -> str | None:
        problem = _check_tensor(file, there.get(name), entries[name])
        if problem is None:
            checked(entries[name].size_bytes, name)
        return problem

    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        answers = list(pool.map(check, entries))
    problems += [
        f"{url}: tensor {name} {answer}"
        for name, answer in zip(entries, answers, strict=True)
        if answer
    ]
    return problems


def _check_tensor(file: StoredFile, found: TensorInfo | None, entry: Entry) -> str | None:
    if found is None or not is_like(found, entry):
        return unlike(found, entry)
    spans = _Spans(entry.span_bytes)
    file.read(found.start, found.stop_exclusive, spans.take)
    return None if spans.checksum() == entry.checksum else "has other bytes than were written"


class _Spans:
    """The checksum of a tensor, as the manifest defines it, from pieces of any length."""

    def __init__(self, span_bytes: int) -> None:
        self._span_bytes = span_bytes
        self._digests: list[bytes] = []
        self._span, self._left = xxh3_128(), span_bytes

    def take(self, piece: Any) -> None:
        data = memoryview(piece).cast("B")
        while data:
            part = data[: self._left]
            self._span.update(part)
            data, self._left = data[len(part) :], self._left - len(part)
            if not self._left:
                self._digests.append(self._span.digest())
                self._span, self._left = xxh3_128(), self._span_bytes

    def checksum(self) -> str:
        last = [self._span.digest()] if self._left != self._span_bytes else []
        return xxh3_128_hexdigest(b"".join([*self._digests, *last]))


def _edited(files: Any, store: Store, contents: StoreContents) -> tuple[str, ...]:
    """Names of the small files whose contents are not what was written."""
    edited = []
    for name, checksum in files.items():
        if name not in contents.objects:
            continue
        content = xxh3_128()
        found = contents.objects[name]
        StoredFile(store, found).read(0, found.size_bytes, content.update)
        if content.hexdigest() != checksum:
            edited.append(name)
    return tuple(edited)
