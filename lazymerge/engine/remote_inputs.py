"""The input files of a merge that are not on the local disk, and are not to be as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ..checkpoint import Checkpoint
from ..checkpoint.hub import HubFile, HubSource
from ..checkpoint.range_cache import RangeCache, is_keepable
from ..checkpoint.remote import RemoteSource
from ..checkpoint.tensor import Adapter
from ..checkpoint.transport import RemoteFile, Take
from ..errors import InputError
from .network import Network


class Distant(Protocol):
    """A file that lies elsewhere."""

    @property
    def size_bytes(self) -> int:
        """Of all of it."""

    @property
    def place(self) -> str:
        """Where it lies, for people."""

    @property
    def has_ranges(self) -> bool:
        """Whether parts of it can be asked for."""

    @property
    def identity(self) -> RemoteFile:
        """What tells it, at its version, from all other files."""

    def read(self, start: int, stop: int, take: Take, *, keeps: bool = True) -> None:
        """Hands a byte range on, piece by piece.

        keeps: a cache, if there is one, is to keep it.

        Raises:
            InputError: the file is not what it was. LazymergeError: it cannot be read.
        """

    def check(self) -> None:
        """Checks that the file is what it was, where reading cannot tell.

        Raises:
            InputError: it is not.
        """


@dataclass(frozen=True, slots=True)
class RemoteInput:
    """A file of a model at an address."""

    source: RemoteSource
    name: str
    size_bytes: int

    @property
    def place(self) -> str:
        return self.source.url.split("/", 3)[2]

    @property
    def has_ranges(self) -> bool:
        return self.source.files[self.name].has_ranges

    @property
    def identity(self) -> RemoteFile:
        return self.source.identity(self.name)

    def read(self, start: int, stop: int, take: Take, *, keeps: bool = True) -> None:
        self.source.read(self.name, start, stop, take)

    def check(self) -> None:
        self.source.check(self.name)


@dataclass(frozen=True, slots=True)
class HubInput:
    """A file of a model of the Hub, at its commit."""

    source: HubSource
    name: str
    size_bytes: int

    @property
    def place(self) -> str:
        return self.source.repository

    @property
    def has_ranges(self) -> bool:
        return True

    @property
    def identity(self) -> RemoteFile:
        return HubFile(self.source, self.name).identity

    def read(self, start: int, stop: int, take: Take, *, keeps: bool = True) -> None:
        HubFile(self.source, self.name).read_range(start, stop, take)

    def check(self) -> None:
        """A commit does not change."""


@dataclass(frozen=True, slots=True)
class CachedInput:
    """A file that lies elsewhere, and what a cache has of it."""

    input: Distant
    cache: RangeCache

    @property
    def size_bytes(self) -> int:
        return self.input.size_bytes

    @property
    def place(self) -> str:
        return self.input.place

    @property
    def has_ranges(self) -> bool:
        return self.input.has_ranges

    @property
    def identity(self) -> RemoteFile:
        return self.input.identity

    def read(self, start: int, stop: int, take: Take, *, keeps: bool = True) -> None:
        self.cache.read(self.identity, start, stop, take, self.input.read, keeps=keeps)

    def check(self) -> None:
        self.input.check()


def is_held_whole(file: Distant, network: Network) -> bool:
    """Whether a file is read into memory, all that is read of it, before the merge begins: it comes
    as a whole only, and there is no cache for it."""
    if file.has_ranges:
        return False
    return network.cache_folder is None or not is_keepable(file.identity)


def check_ranges(files: Mapping[str, Distant], network: Network) -> None:
    """Checks that files can be read as they are to be. files: by path.

    Raises:
        InputError: one comes as a whole only, and nobody has said that it may.
    """
    for path, file in files.items():
        if not file.has_ranges and not network.whole_files:
            raise InputError(
                f"{path}: the server sends no ranges of files, only whole ones. Download the "
                "model, use another server, or merge with --whole-files, which reads each file "
                "from beginning to end"
            )


def remote_inputs(checkpoints: Iterable[Checkpoint], *, streams: bool) -> dict[str, Distant]:
    """The files that are read over the network, by path as inputs.py names it.

    streams: models of the Hub are, as far as they are not in its cache.
    """
    inputs: dict[str, Distant] = {}
    for checkpoint in checkpoints:
        parts: list[Checkpoint | Adapter] = [checkpoint]
        if checkpoint.adapter is not None:
            parts.append(checkpoint.adapter)
        for part in parts:
            if part.remote is not None:
                for file in part.files:
                    path = os.path.join(part.folder, file.path)
                    inputs[path] = RemoteInput(part.remote, file.path, file.size_bytes)
        if streams:
            for source, files in checkpoint.files_by_source:
                for file in files:
                    if not source.has(file.path):
                        path = os.path.join(source.folder, file.path)
                        inputs[path] = HubInput(source, file.path, file.size_bytes)
    return inputs
