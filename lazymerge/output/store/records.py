"""What is under an output's prefix, and what it says of itself.

    prefix/.lazymerge/merge.json          the plan that the output belongs to: first of all objects
    prefix/.lazymerge/shards/FILE.json    a shard that is complete: its ETag, its tensors' checksums
    prefix/.lazymerge/lock                held by the run
    prefix/model-00001-of-00003.safetensors   there as soon as it is whole
    prefix/config.json, …, model.safetensors.index.json, lazymerge.json   when all shards are there

An output that has lazymerge.json is complete, and what is below .lazymerge is then removed.
"""

from __future__ import annotations

import fnmatch
import json
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, brief
from ..folder import OWN_FOLDER, OWN_FOLDERS, REPLACED_PATH, is_own_name
from ..layout import Shard
from ..lock import LOCK_PATH
from ..manifest import MANIFEST_FORMAT, MANIFEST_NAME, MAX_DOCUMENT_BYTES, MERGE_PATH
from .client import Store, StoredObject

RECORD_FOLDER = f"{OWN_FOLDER}/shards"
RECORD_FORMAT = 1

FINGERPRINT_KEY = "lazymerge-fingerprint"
"""Of what is noted of a shard's object when it is made: the plan that it is of."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """An output tensor in a shard that is complete.

    checksum: as the manifest defines it. is_nonfinite: it holds inf or nan.
    statistics: gathered of it; empty: none were.
    """

    checksum: str
    is_nonfinite: bool = False
    statistics: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard that is complete in a store.

    etag, size_bytes: of its object. tensors: by name. at: when, in seconds since 1970.
    """

    file: str
    fingerprint: str
    size_bytes: int
    etag: str
    tensors: Mapping[str, TensorRecord]
    at: float

    @property
    def name(self) -> str:
        """Of the object that says so."""
        return record_name(self.file)

    def as_bytes(self) -> bytes:
        """The object's content."""
        tensors = {
            name: [tensor.checksum, tensor.is_nonfinite, list(tensor.statistics)]
            for name, tensor in self.tensors.items()
        }
        document = {
            "format": RECORD_FORMAT,
            "file": self.file,
            "fingerprint": self.fingerprint,
            "size_bytes": self.size_bytes,
            "etag": self.etag,
            "at": round(self.at, 3),
            "tensors": tensors,
        }
        return json.dumps(document, ensure_ascii=False).encode()


def new_record(
    fingerprint: str, found: StoredObject, tensors: Mapping[str, TensorRecord]
) -> ShardRecord:
    """Of a shard that has just been completed."""
    return ShardRecord(
        found.name, fingerprint, found.size_bytes, found.etag, dict(tensors), time.time()
    )


def is_of_plan(
    found: StoredObject, noted: Mapping[str, str], size_bytes: int, fingerprint: str
) -> bool:
    """Whether an object is a shard of a plan, whole. noted: of it when it was made."""
    return found.size_bytes == size_bytes and noted.get(FINGERPRINT_KEY) == fingerprint


def record_name(file: str) -> str:
    """Of the object that says that a shard is complete."""
    return f"{RECORD_FOLDER}/{file}.json"


def read_record(
    store: Store, shard: Shard, found: Mapping[str, StoredObject], fingerprint: str
) -> ShardRecord | None:
    """What says that a shard is complete, if it says so of the object that is there now.

    found: the output's objects.
    """
    name = record_name(shard.file)
    there = found.get(shard.file)
    if name not in found or there is None:
        return None
    fetched = store.get(name, MAX_DOCUMENT_BYTES)
    record = None if fetched is None else parsed_record(fetched.content)
    if record is None or record.tensors.keys() != {tensor.name for tensor in shard.tensors}:
        return None
    is_said = (record.fingerprint, record.file, record.size_bytes, record.etag)
    is_there = (fingerprint, shard.file, shard.size_bytes, there.etag)
    return record if is_said == is_there and there.size_bytes == shard.size_bytes else None


def parsed_record(content: bytes) -> ShardRecord | None:
    """A record; None if somebody has damaged it."""
    try:
        document: Any = json.loads(content)
        if document["format"] != RECORD_FORMAT:
            return None
        texts = [document[key] for key in ("file", "fingerprint", "etag")]
        tensors = {
            name: TensorRecord(checksum, is_nonfinite, tuple(map(float, numbers)))
            for name, (checksum, is_nonfinite, numbers) in document["tensors"].items()
            if type(checksum) is str and type(is_nonfinite) is bool
        }
        if not all(type(text) is str for text in texts):
            return None
        file, fingerprint, etag = texts
        size_bytes, at = int(document["size_bytes"]), float(document["at"])
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError):
        return None
    return ShardRecord(file, fingerprint, size_bytes, etag, tensors, at)


def statistics_of(record: TensorRecord) -> array[float]:
    """As `write_statistics` takes them."""
    return array("d", record.statistics)


@dataclass(frozen=True, slots=True)
class StoreContents:
    """What is under a prefix.

    objects: by name. merge: what the output is being made from, if it says so.
    manifest: of a complete output.
    """

    objects: Mapping[str, StoredObject]
    merge: dict[str, Any] | None
    manifest: dict[str, Any] | None

    @property
    def is_unfinished(self) -> bool:
        """Whether a run has begun and is not complete."""
        return self.merge is not None and self.manifest is None

    @property
    def foreign(self) -> list[str]:
        """Names of what no merge has written."""
        return sorted(name for name in self.objects if not is_own_object(name))

    @property
    def own(self) -> list[str]:
        """Names of what a merge writes, but for the lock."""
        return sorted(name for name in self.objects if is_own_object(name) and name != LOCK_PATH)

    @property
    def is_earlier(self) -> bool:
        """Whether it is lazymerge's at all."""
        return any(name == MANIFEST_NAME or name.startswith(f"{OWN_FOLDER}/") for name in self.own)


def look(store: Store) -> StoreContents:
    """What is under an output's prefix now.

    Raises:
        InputError: a document is damaged, or the store may not be read.
    """
    objects = store.objects()
    merge, manifest = (
        store_document(store, name) if name in objects and objects[name].size_bytes else None
        for name in (MERGE_PATH, MANIFEST_NAME)
    )
    return StoreContents(objects, merge, manifest)


def store_document(store: Store, name: str) -> dict[str, Any] | None:
    """A manifest, or the beginning of one; None if it is not there.

    Raises:
        InputError: it is not what a run writes.
    """
    fetched = store.get(name, MAX_DOCUMENT_BYTES)
    if fetched is None:
        return None
    url = store.address.url(name)
    try:
        document = json.loads(fetched.content)
        if not isinstance(document, dict):
            raise TypeError("no mapping")
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{url} is damaged ({brief(error)}): it was changed after lazymerge wrote it; "
            "--overwrite makes the output anew"
        ) from None
    if document.get("format") != MANIFEST_FORMAT:
        raise InputError(f"{url} was not written by this version of lazymerge")
    return document


def document_bytes(contents: Mapping[str, Any]) -> bytes:
    """A manifest, or the beginning of one, as an object's content."""
    document = {"format": MANIFEST_FORMAT, **contents}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def is_own_object(name: str) -> bool:
    """Whether it is the name of an object that a merge writes."""
    folder, _, rest = name.rpartition("/")
    if not folder:
        return is_own_name(name)
    if folder == RECORD_FOLDER:
        return rest.endswith(".json") and is_own_name(rest.removesuffix(".json"))
    return any(fnmatch.fnmatchcase(rest, pattern) for pattern in OWN_FOLDERS.get(folder, ()))


def remove_output(store: Store, names: Sequence[str]) -> None:
    """Removes an earlier output. What says that it is complete goes first, and what says that the
    rest is lazymerge's goes last, so that whoever comes upon a half removed one may go on.

    names: of its own objects.
    """
    if not names:
        return
    store.put(REPLACED_PATH, b"{}\n")
    first = [name for name in names if name == MANIFEST_NAME]
    last = [name for name in names if name.startswith(f"{OWN_FOLDER}/") and name != REPLACED_PATH]
    store.remove(first)
    store.remove([name for name in names if name not in (*first, *last, REPLACED_PATH)])
    store.remove(last)


def remove_beginnings(store: Store, names: Sequence[str]) -> None:
    """Removes what an output needs no more when its manifest is there.

    names: of its own objects. merge.json goes last of all.
    """
    own = {name for name in names if name.startswith(f"{OWN_FOLDER}/")} - {LOCK_PATH, MERGE_PATH}
    store.remove(sorted(own))
    store.remove([MERGE_PATH])
