"""Open a model of the Hugging Face Hub: config and index are fetched, of the weights the headers.

What is in the cache is read there. Of a file that is not, the header comes by a ranged request, and
the checkpoint says what it would say of the file itself: a plan can be made, and it is the same
plan, before anything large is fetched.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from .folder import (
    CONFIG_LIMIT_BYTES,
    CONFIG_NAME,
    INDEX_LIMIT_BYTES,
    INDEX_NAME,
    open_folder,
)
from .header import Header, parse_header, read_header
from .hub import HubSource, fetch, find_source, read_start, silently
from .hub_reference import HubReference
from .tensor import Checkpoint
from .torch_file import is_torch_name
from .wording import quoted

REQUESTS_AT_ONCE = 8


def open_hub_model(reference: str, wanted: HubReference) -> Checkpoint:
    """A model of the Hub, at the commit that its revision means now.

    reference: as the recipe writes it.

    Raises:
        InputError: there is none, it may not be read, or it is not what can be merged.
        LazymergeError: the Hub gives no answer, and the cache does not have it all.
    """
    source = find_source(wanted)
    try:
        for name, limit_bytes in (
            (CONFIG_NAME, CONFIG_LIMIT_BYTES),
            (INDEX_NAME, INDEX_LIMIT_BYTES),
        ):
            if name in source.sizes:
                _fetch_small(source, name, limit_bytes)
        checkpoint = open_folder(
            reference,
            Path(source.folder),
            names=sorted(name for name in source.sizes if "/" not in name),
            read_all=lambda files: _headers(source, files),
        )
    except InputError as error:
        why = f" ({source.note})" if source.note else ""
        raise InputError(f"model {quoted(str(wanted))} of the Hub{why}: {error}") from None
    notices = (source.note,) if source.note and not source.is_offline else ()
    return replace(checkpoint, hub=source, notices=(*checkpoint.notices, *notices))


def check_fetched(source: HubSource, planned: Checkpoint) -> None:
    """Check that the files that have been fetched are those whose headers a plan was made from.

    Raises:
        InputError: one is not.
    """
    for file in planned.files:
        path = Path(source.folder) / file.path
        if replace(read_header(path, file.path).file, modified_ns=None) != file:
            raise InputError(
                f"{path}: is not the file whose header the Hub sent when the merge was planned. "
                "Delete it and plan again."
            )


def _fetch_small(source: HubSource, name: str, limit_bytes: int) -> None:
    if source.sizes[name] > limit_bytes:
        raise InputError(
            f"{name}: holds {source.sizes[name]:,} bytes; at most {limit_bytes:,} are read. "
            "It is not what its name says."
        )
    fetch(source, name, silently)


def _headers(source: HubSource, files: list[str]) -> list[Header]:
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(lambda file: _header(source, file), files))


def _header(source: HubSource, file: str) -> Header:
    if is_torch_name(file):
        raise InputError(
            f"{file} is a torch file, which is not read from the Hub. Download the model into a "
            f"folder: hf download {source.repository} --local-dir FOLDER"
        )
    size_bytes = source.sizes[file]
    if not source.has(file):
        return parse_header(
            lambda count: read_start(source, file, count),
            size_bytes,
            file,
            f"{source.repository}/{file}",
        )
    path = Path(source.folder) / file
    header = read_header(path, file)
    if header.file.size_bytes != size_bytes:
        raise InputError(
            f"{path}: holds {header.file.size_bytes:,} bytes, the Hub lists {size_bytes:,}. Delete "
            "it and try again."
        )
    return replace(header, file=replace(header.file, modified_ns=None))
