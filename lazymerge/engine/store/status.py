"""How far an output in a store is, from what its objects say."""

from __future__ import annotations

from ...errors import InputError, brief
from ...output.manifest import MANIFEST_NAME, MAX_DOCUMENT_BYTES, MERGE_PATH
from ...output.status import OutputStatus, facts_of
from ...output.store.address import StoreAddress
from ...output.store.client import Store
from ...output.store.lock import store_lock_owner
from ...output.store.records import RECORD_FOLDER, StoreContents, look, parsed_record


def store_status(address: StoreAddress) -> OutputStatus:
    """Looks at an output.

    Raises:
        InputError: it is no output of lazymerge, or its documents are damaged.
    """
    store = Store(address)
    contents = look(store)
    document = contents.manifest or contents.merge
    if document is None:
        raise InputError(f"{address} is no output of lazymerge: it has no {MANIFEST_NAME}")
    name = MERGE_PATH if contents.is_unfinished else MANIFEST_NAME
    try:
        facts = facts_of(document)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{address.url(name)} is damaged ({brief(error)})") from error
    if not contents.is_unfinished:
        return OutputStatus(
            state="complete", tensors=facts["total_tensors"], bytes=facts["total_bytes"], **facts
        )
    tensors, size, times = _done(store, contents, facts["fingerprint"])
    owner = store_lock_owner(store)
    return OutputStatus(
        state="running" if owner else "unfinished",
        tensors=tensors,
        bytes=min(size, facts["total_bytes"]),
        owner=owner,
        began=min(times, default=None),
        last=max(times, default=None),
        **facts,
    )


def _done(store: Store, contents: StoreContents, fingerprint: str) -> tuple[int, int, list[float]]:
    """Tensors and bytes of the shards that are complete, and when they were."""
    tensors = size = 0
    times = []
    for name, found in contents.objects.items():
        file = name.removeprefix(f"{RECORD_FOLDER}/").removesuffix(".json")
        if file == name or file not in contents.objects or found.size_bytes > MAX_DOCUMENT_BYTES:
            continue
        fetched = store.get(name, MAX_DOCUMENT_BYTES)
        record = None if fetched is None else parsed_record(fetched.content)
        if record is None or record.fingerprint != fingerprint:
            continue
        if record.etag == contents.objects[file].etag:
            tensors += len(record.tensors)
            size += record.size_bytes
            times.append(record.at)
    return tensors, size, times
