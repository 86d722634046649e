"""The input files of a merge that are not on the local disk, and are not to be."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..checkpoint import Checkpoint
from ..checkpoint.hub import HubFile, HubSource
from ..checkpoint.remote import RemoteSource
from ..checkpoint.tensor import Adapter
from ..checkpoint.transport import Take


class Distant(Protocol):
    """A file that lies elsewhere."""

    @property
    def size_bytes(self) -> int:
        """Of all of it."""

    @property
    def place(self) -> str:
        """Where it lies, for people."""

    def read(self, start: int, stop: int, take: Take) -> None:
        """Hands a byte range on, piece by piece.

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

    def read(self, start: int, stop: int, take: Take) -> None:
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

    def read(self, start: int, stop: int, take: Take) -> None:
        HubFile(self.source, self.name).read_range(start, stop, take)

    def check(self) -> None:
        """A commit does not change."""


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
