"""Models that lie elsewhere: `https://host/folder`, `s3://bucket/folder`, `gs://bucket/folder`.

Headers are read by ranged requests; config, index and what lies beside the weights are small, and
are held in a folder of their own that goes when the checkpoint does. Of tensor data nothing is read
here. A checkpoint's folder is the address itself: the same on every machine.

Web servers list no folders, so they are asked for the names that a model has.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError, LazymergeError
from .at_once import requesting
from .broken_file import BrokenFileError
from .folder import (
    CONFIG_LIMIT_BYTES,
    CONFIG_NAME,
    INDEX_LIMIT_BYTES,
    INDEX_NAME,
    INDEX_SUFFIX,
    SINGLE_NAME,
    SUFFIX,
    TORCH_SINGLE_NAME,
    index_among,
    indexed_files,
    is_plain_name,
    open_folder,
)
from .header import FIRST_READ_BYTES, Header, parse_header
from .remote_reference import check_url, scheme_of
from .scattered import REQUESTS_AT_ONCE as ENTRIES_AT_ONCE
from .scattered import FetchedBytes
from .tensor import Checkpoint
from .torch_file import TORCH_SUFFIXES, is_torch_name, parse_torch_file
from .transport import (
    AbsentError,
    RemoteFile,
    Take,
    Transport,
    begin,
    persistently,
    read_range,
    transport_of,
)
from .wording import quoted

REQUESTS_AT_ONCE = 8

BESIDE_LIMIT_BYTES = 200_000_000
"""Of one file beside the weights: the largest tokenizers in use are below 40 MB."""

BESIDE_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""What is looked for beside the weights on a server that lists no folders."""

_T = TypeVar("_T")
_R = TypeVar("_R")


class _Folder:
    """A folder of this process's own, removed when nothing refers to it any more."""

    def __init__(self) -> None:
        self.path = os.path.realpath(tempfile.mkdtemp(prefix="lazymerge-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        _folders.add(self)


_folders: weakref.WeakSet[_Folder] = weakref.WeakSet()


def remove_folders() -> None:
    """Removes all folders of this process's own: for one that ends without Python's own end."""
    for folder in list(_folders):
        folder.remove()


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """A model that lies elsewhere, each file at one version.

    url: of its folder. files: by name; those whose tensors are read, and those beside them.
    """

    url: str
    files: Mapping[str, RemoteFile]
    _folder: _Folder | None = field(compare=False, repr=False)

    @property
    def folder(self) -> str:
        """Where its small files are on this machine, absolute."""
        assert self._folder is not None, "they are where the model was opened"
        return self._folder.path

    def __reduce__(self) -> tuple[type[RemoteSource], tuple[object, ...]]:
        """For another process, which reads tensors of it and nothing else."""
        return RemoteSource, (self.url, dict(self.files), None)

    def read(self, name: str, start: int, stop: int, take: Take) -> None:
        """Hands a byte range of a file on.

        Raises:
            InputError: the file is not what it was. LazymergeError: it cannot be read.
        """
        read_range(_transport(scheme_of(self.url)), self.files[name], start, stop, take)

    def identity(self, name: str) -> RemoteFile:
        """A file at its version, told from all others that there are anywhere."""
        file = self.files[name]
        place = _transport(scheme_of(self.url)).place(self.url)
        return replace(file, url=f"{place} {file.url}")

    def check(self, name: str) -> None:
        """Checks that a file is what it was, where reading cannot tell.

        Raises:
            InputError: it is not.
        """
        _transport(scheme_of(self.url)).check(self.files[name])


@cache
def _transport(scheme: str) -> Transport:
    return transport_of(scheme)


def open_remote_model(reference: str, *, is_beside_wanted: bool = True) -> Checkpoint:
    """A model that lies elsewhere, as it is now.

    reference: a folder, or a file of tensors; without credentials.
    is_beside_wanted: what lies beside the weights is fetched too.

    Raises:
        InputError: there is none, it may not be read, or it is not what can be merged.
        LazymergeError: it does not come.
    """
    url = check_url(reference)
    transport = _transport(scheme_of(url))
    single = url.endswith((SUFFIX, *TORCH_SUFFIXES))
    base, _, only = url.rpartition("/") if single else (url, "", "")
    opening = _Opening(transport, base)
    try:
        names = [only] if single else opening.find_names()
    except AbsentError:
        raise InputError(f"model {quoted(reference)}: is not there. Correct the address.") from None
    except LazymergeError as error:
        text = str(error).replace(opening.folder.path, base)
        raise type(error)(f"model {quoted(reference)}: {text}") from None
    try:
        checkpoint = open_folder(
            reference, Path(opening.folder.path), names=sorted(names), read_all=opening.headers
        )
        if is_beside_wanted and not single:
            opening.fetch_beside()
    except InputError as error:
        text = str(error).replace(opening.folder.path, base)
        raise InputError(f"model {quoted(reference)}: {text}") from None
    source = RemoteSource(base, dict(opening.files), opening.folder)
    return replace(
        checkpoint,
        folder=base,
        remote=source,
        notices=(*checkpoint.notices, *opening.notices()),
    )


def open_remote_files(
    reference: str, small: Mapping[str, int], weights: Sequence[str]
) -> tuple[RemoteSource, Header]:
    """A folder that lies elsewhere, of which it is known what it must hold.

    reference: without credentials. small: names of files that are fetched, and their most bytes.
    weights: names that its file of tensors may have; the first that is there counts.

    Raises:
        InputError: one of them is not there, may not be read or is broken.
        LazymergeError: one does not come.
    """
    url = check_url(reference)
    opening = _Opening(_transport(scheme_of(url)), url)
    _each(lambda pair: opening.fetch_small(*pair), small.items())
    absent = next((name for name in small if name not in opening.files), None)
    if absent is not None:
        raise InputError(f"{url}: holds no {absent}. Correct the address.")
    name = next((name for name in weights if opening.is_there(name)), weights[0])
    (header,) = opening.headers([name])
    return RemoteSource(url, dict(opening.files), opening.folder), header


class _Opening:
    """A model that is being opened."""

    def __init__(self, transport: Transport, url: str) -> None:
        self._transport = transport
        self._url = url
        self._starts: dict[str, bytes] = {}
        self._listed: dict[str, RemoteFile] | None = None
        self.files: dict[str, RemoteFile] = {}
        self.folder = _Folder()

    def find_names(self) -> list[str]:
        """The names of the model's files, as far as they say which ones hold tensors; config and
        index are fetched.

        Raises:
            AbsentError: there is no such folder.
        """
        listed = persistently(self._url, lambda: self._transport.names(self._url))
        if listed is not None:
            # files are made by these names, here too
            names = [name for name in listed if is_plain_name(name) and name.isprintable()]
            self._listed = {name: listed[name] for name in names}
            if not names:
                raise AbsentError(self._url)
            index = index_among(sorted(names))
            wanted = [(CONFIG_NAME, CONFIG_LIMIT_BYTES)]
            wanted += [] if index is None else [(index, INDEX_LIMIT_BYTES)]
            _each(lambda pair: self.fetch_small(*pair), wanted)
            return names
        return self._find_usual_names()

    def _find_usual_names(self) -> list[str]:
        """The model's files by the names that models have, for nobody lists them."""
        config = (CONFIG_NAME, CONFIG_LIMIT_BYTES)
        for single, beside in ((SINGLE_NAME, [config]), (TORCH_SINGLE_NAME, [])):
            index = single + INDEX_SUFFIX
            small = [*beside, (index, INDEX_LIMIT_BYTES)]
            with requesting(1) as pool:  # asked for at once, whichever there is
                is_there = pool.submit(self._begin, single)
                _each(lambda pair: self.fetch_small(*pair), small)
            if index in self.files:
                self._forget(single)
                return [index, *indexed_files(Path(self.folder.path, index))]
            if is_there.result():
                return [single]
        raise InputError(
            f"has neither {INDEX_NAME} nor {SINGLE_NAME}, nor {TORCH_SINGLE_NAME}, and a web "
            "server lists no other files. Give the address of the file itself"
        )

    def _forget(self, name: str) -> None:
        """A file is no part of the model."""
        self.files.pop(name, None)
        self._starts.pop(name, None)

    def is_there(self, name: str) -> bool:
        """Whether the folder has such a file."""
        return self._begin(name)

    def headers(self, names: list[str]) -> list[Header]:
        """Those of files of tensors."""
        return _each(self._header, names)

    def _header(self, name: str) -> Header:
        if not self._begin(name):
            raise InputError(f"{self._url}/{name}: is not there")
        file, first = self.files[name], self._starts.pop(name)
        if is_torch_name(name):
            return self._torch_header(name, file, first)

        def start(count: int) -> bytes:
            count = min(count, file.size_bytes)
            if count <= len(first):
                return first[:count]
            return first + self._read(name, len(first), count)

        header = parse_header(start, file.size_bytes, name, file.url)
        return replace(header, file=replace(header.file, pin=file.pin))

    def _torch_header(self, name: str, file: RemoteFile, first: bytes) -> Header:
        def fetch(start: int, stop: int) -> bytes:
            return self._read(name, start, stop)

        if not file.has_ranges:
            raise InputError(
                f"{file.url}: the server sends no ranges of files, and where the tensors of a "
                "torch file lie stands at its end. Download the model, or use another server"
            )
        try:
            with requesting(ENTRIES_AT_ONCE) as pool:
                source = FetchedBytes(first, file.size_bytes, fetch, pool)
                header = parse_torch_file(source, name)
        except BrokenFileError as error:
            raise InputError(f"{file.url}: {error}") from None
        return replace(header, file=replace(header.file, pin=file.pin))

    def fetch_beside(self) -> None:
        """Has what lies beside the weights, and may be copied or read, in the folder."""
        names = BESIDE_NAMES if self._listed is None else self._listed
        from fnmatch import fnmatchcase

        patterns = (*BESIDE_NAMES, "tokenizer.model.v[0-9]*", "*.tiktoken")
        wanted = [n for n in names if any(fnmatchcase(n, p) for p in patterns)]
        if self._listed is not None:
            wanted = [n for n in wanted if self._listed[n].size_bytes <= BESIDE_LIMIT_BYTES]
        _each(lambda name: self.fetch_small(name, BESIDE_LIMIT_BYTES), wanted)

    def notices(self) -> list[str]:
        """What a person should know."""
        loose = [n for n, file in self.files.items() if file.pin == "without version"]
        if not loose:
            return []
        return [f"the server names no version of {loose[0]}: only a change of size is noticed"]

    def _begin(self, name: str) -> bool:
        """Finds out what a file is; whether it is there."""
        if name in self.files:
            return True
        if self._listed is not None and name not in self._listed:
            return False
        try:
            file, start = begin(self._transport, f"{self._url}/{name}", FIRST_READ_BYTES)
        except AbsentError:
            return False
        self._starts[name] = start
        self.files[name] = file
        return True

    def fetch_small(self, name: str, limit_bytes: int) -> None:
        """Has a small file in the folder, if there is one.

        Raises:
            InputError: it is larger than it may be.
        """
        if not self._begin(name):
            return
        file, start = self.files[name], self._starts.pop(name)
        if file.size_bytes > limit_bytes:
            raise InputError(
                f"{file.url}: holds {file.size_bytes:,} bytes; at most {limit_bytes:,} are read. "
                "It is not what its name says."
            )
        with open(os.path.join(self.folder.path, name), "xb") as stream:

            def keep(piece: Any) -> None:
                stream.write(piece)

            keep(start)
            if len(start) < file.size_bytes:  # piece by piece: it may be 200 MB
                read_range(self._transport, file, len(start), file.size_bytes, keep)

    def _read(self, name: str, start: int, stop: int) -> bytes:
        data = bytearray()
        read_range(self._transport, self.files[name], start, stop, data.extend)
        return bytes(data)


def _each(work: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """Does something with several things at once; results in their order."""
    with requesting(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(work, items))
