"""Counting what comes over the network, while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.transport import RemoteFile, Take
from .remote_inputs import Distant

Fetched = Callable[[int], None]
"""Told how many more bytes have come; from the threads that wait for them."""


@dataclass(frozen=True, slots=True)
class CountedInput:
    """A file that lies elsewhere; whatever comes of it is told."""

    file: Distant
    fetched: Fetched

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    @property
    def place(self) -> str:
        return self.file.place

    @property
    def has_ranges(self) -> bool:
        return self.file.has_ranges

    @property
    def identity(self) -> RemoteFile:
        return self.file.identity

    def read(self, start: int, stop: int, take: Take, *, keeps: bool = True) -> None:
        def counted(piece: Any) -> None:
            take(piece)
            self.fetched(memoryview(piece).nbytes)

        self.file.read(start, stop, counted, keeps=keeps)

    def check(self) -> None:
        self.file.check()


def counted(files: Mapping[str, Distant], fetched: Fetched) -> dict[str, Distant]:
    """Files by path, whose bytes are counted as they come."""
    return {path: CountedInput(file, fetched) for path, file in files.items()}
