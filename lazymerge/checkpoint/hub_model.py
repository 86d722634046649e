"""Open a model of the Hugging Face Hub: config and index are fetched, of the weights the headers.

What is in the cache is read there. Of a file that is not, the header comes by a ranged request, and
the checkpoint says what it would say of the file itself: a plan can be made, and it is the same
plan, before anything large is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from .at_once import requesting
from .broken_file import BrokenFileError
from .folder import (
    CONFIG_LIMIT_BYTES,
    CONFIG_NAME,
    INDEX_LIMIT_BYTES,
    SUFFIX,
    index_among,
    open_folder,
)
from .header import FIRST_READ_BYTES, Header, parse_header, read_header
from .hub import HubFile, HubSource, NoRangesError, fetch, find_source, read_start, silently
from .hub_reference import HubReference
from .scattered import REQUESTS_AT_ONCE as ENTRIES_AT_ONCE
from .scattered import FetchedBytes
from .tensor import Checkpoint, FileInfo
from .torch_file import is_torch_name, parse_torch_file, read_torch_file
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
        names = sorted(name for name in source.sizes if "/" not in name)
        index = index_among(names)
        small = {index: INDEX_LIMIT_BYTES} if index is not None else {}
        if CONFIG_NAME in source.sizes:
            small[CONFIG_NAME] = CONFIG_LIMIT_BYTES
        with requesting(max(1, len(small))) as pool:
            list(pool.map(lambda pair: fetch_small(source, *pair), small.items()))
        checkpoint = open_folder(
            reference,
            Path(source.folder),
            names=names,
            read_all=lambda files: hub_headers(source, files, notices),
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
        header = _read_cached(path, file.path) if _holds_tensors(file.path) else None
        if header is not None and replace(header.file, modified_ns=None) != file:
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


def hub_headers(source: HubSource, files: list[str], notices: list[str]) -> list[Header]:
    """What files of the Hub say of their tensors.

    notices: what a person should know of how they were read is added to them.

    Raises:
        InputError: one is broken, or not what the Hub said.
        LazymergeError: one does not come.
    """
    absent = [file for file in files if not source.has(file)]
    try:
        with requesting(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(lambda file: _header(source, file), files))
    except NoRangesError:
        of_torch = [file for file in absent if is_torch_name(file)]
        notices.append(
            f"downloaded to be planned: where the tensors of {listed(of_torch)} lie stands at "
            "their ends, and this Hub sends no ranges of files"
        )
        for file in of_torch:
            fetch(source, file)
        return [_header(source, file) for file in files]


def _header(source: HubSource, file: str) -> Header:
    """Raises as hub_headers does; NoRangesError for a torch file that the Hub sends whole."""
    size_bytes = source.sizes[file]
    if not source.has(file):
        where = f"{source.repository}/{file}"
        if is_torch_name(file):
            return _torch_header(source, file, where)
        return parse_header(lambda count: read_start(source, file, count), size_bytes, file, where)
    path = Path(source.folder) / file
    header = _read_cached(path, file)
    if header.file.size_bytes != size_bytes:
        raise InputError(
            f"{path}: holds {header.file.size_bytes:,} bytes, the Hub lists {size_bytes:,}. Delete "
            "it and try again."
        )
    return replace(header, file=replace(header.file, modified_ns=None))


def _torch_header(source: HubSource, file: str, where: str) -> Header:
    whole = HubFile(source, file)

    def part(start: int, stop: int) -> bytes:
        data = bytearray()
        whole.read_range(start, stop, data.extend)
        return bytes(data)

    first = read_start(source, file, FIRST_READ_BYTES)
    try:
        with requesting(ENTRIES_AT_ONCE) as pool:
            return parse_torch_file(FetchedBytes(first, source.sizes[file], part, pool), file)
    except BrokenFileError as error:
        raise InputError(f"{where}: {error}") from None


def _holds_tensors(file: str) -> bool:
    return file.endswith(SUFFIX) or is_torch_name(file)


def _read_cached(path: Path, file: str) -> Header:
    return read_torch_file(path, file) if is_torch_name(file) else read_header(path, file)
