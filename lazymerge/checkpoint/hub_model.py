"""Open a model of the Hugging Face Hub: config and index are fetched, of the weights the headers.

What is in the cache is read there. Of a file that is not, the header comes by a ranged request, and
the checkpoint says what it would say of the file itself: a plan can be made, and it is the same
plan, before anything large is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from .folder import (
    CONFIG_LIMIT_BYTES,
    CONFIG_NAME,
    INDEX_LIMIT_BYTES,
    INDEX_NAME,
    SUFFIX,
    open_folder,
)
from .header import Header, parse_header, read_header
from .hub import HubSource, fetch, find_source, read_start, silently
from .hub_reference import HubReference
from .tensor import Checkpoint, FileInfo
from .torch_file import is_torch_name, read_torch_file
from .wording import listed, quoted

REQUESTS_AT_ONCE = 8


def open_hub_model(reference: str, wanted: HubReference) -> Checkpoint:
    """A model of the Hub, at the commit that its revision means now.

    reference: as the recipe writes it.

    Raises:
        InputError: there is none, it may not be read, or it is not what can be merged.
        LazymergeError: the Hub gives no answer, and the cache does not have it all.
    """
    source = find_source(wanted)
    notices: list[str] = []
    try:
        for name, limit_bytes in (
            (CONFIG_NAME, CONFIG_LIMIT_BYTES),
            (INDEX_NAME, INDEX_LIMIT_BYTES),
        ):
            if name in source.sizes:
                fetch_small(source, name, limit_bytes)
        checkpoint = open_folder(
            reference,
            Path(source.folder),
            names=sorted(name for name in source.sizes if "/" not in name),
            read_all=lambda files: _headers(source, files, notices),
        )
    except InputError as error:
        why = f" ({source.note})" if source.note else ""
        raise InputError(f"model {quoted(str(wanted))} of the Hub{why}: {error}") from None
    if source.note and not source.is_offline:
        notices.append(source.note)
    return replace(checkpoint, hub=source, notices=(*checkpoint.notices, *notices))


def check_fetched(source: HubSource, files: Iterable[FileInfo]) -> None:
    """Check that the files that have been fetched are those whose headers a plan was made from.

    files: as the plan has them.

    Raises:
        InputError: one is not.
    """
    for file in files:
        path = Path(source.folder) / file.path
        if not file.path.endswith(SUFFIX):
            continue  # fetched whole before it was looked at
        if replace(read_header(path, file.path).file, modified_ns=None) != file:
            raise InputError(
                f"{path}: is not the file whose header the Hub sent when the merge was planned. "
                "Delete it and plan again."
            )


def fetch_small(source: HubSource, name: str, limit_bytes: int) -> None:
    """Have a config or the like in the cache.

    Raises:
        InputError: it is larger than it may be, or not what the Hub said.
        LazymergeError: it does not come.
    """
    if source.sizes[name] > limit_bytes:
        raise InputError(
            f"{name}: holds {source.sizes[name]:,} bytes; at most {limit_bytes:,} are read. "
            "It is not what its name says."
        )
    fetch(source, name, silently)


def _headers(source: HubSource, files: list[str], notices: list[str]) -> list[Header]:
    of_torch = [file for file in files if is_torch_name(file) and not source.has(file)]
    if of_torch:
        notices.append(
            f"downloaded to be planned: where the tensors of {listed(of_torch)} lie stands in the "
            "whole file only (safetensors files say it first)"
        )
    with ThreadPoolExecutor(1 if of_torch else REQUESTS_AT_ONCE) as pool:
        return list(pool.map(lambda file: hub_header(source, file), files))


def hub_header(source: HubSource, file: str) -> Header:
    """What a file of the Hub says of its tensors. Of a torch file that is not in the cache, the
    whole is fetched, and the library's progress shown.

    Raises:
        InputError: it is broken, or not what the Hub said.
        LazymergeError: it does not come.
    """
    size_bytes = source.sizes[file]
    if is_torch_name(file):
        fetch(source, file)
    elif not source.has(file):
        return parse_header(
            lambda count: read_start(source, file, count),
            size_bytes,
            file,
            f"{source.repository}/{file}",
        )
    path = Path(source.folder) / file
    header = read_torch_file(path, file) if is_torch_name(file) else read_header(path, file)
    if header.file.size_bytes != size_bytes:
        raise InputError(
            f"{path}: holds {header.file.size_bytes:,} bytes, the Hub lists {size_bytes:,}. Delete "
            "it and try again."
        )
    return replace(header, file=replace(header.file, modified_ns=None))
