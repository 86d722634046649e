"""Reading the objects of an output by ranges."""

from __future__ import annotations

from dataclasses import dataclass

from ...checkpoint.transport import RemoteFile, Take, read_range
from .client import Store, StoredObject


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An object, as what reads inputs that lie elsewhere wants it."""

    store: Store
    found: StoredObject

    @property
    def size_bytes(self) -> int:
        """Of all of it."""
        return self.found.size_bytes

    @property
    def place(self) -> str:
        """Where it lies, for people."""
        return self.store.address.bucket

    @property
    def has_ranges(self) -> bool:
        """Whether parts of it can be asked for."""
        return True

    @property
    def identity(self) -> RemoteFile:
        """What tells it, at its version, from all other files."""
        url = self.store.address.url(self.found.name)
        return RemoteFile(url, self.found.size_bytes, self.found.etag)

    def read(self, start: int, stop: int, take: Take, *, keeps: bool = True) -> None:
        """Hands a byte range on, piece by piece; asks again for what does not come.

        keeps: there is no cache of outputs.

        Raises:
            InputError: the object is not what it was. LazymergeError: it cannot be read.
        """
        read_range(_Reader(self), self.identity, start, stop, take)

    def check(self) -> None:
        """Every answer is held against the ETag."""


@dataclass(frozen=True, slots=True)
class _Reader:
    stored: StoredFile

    def read(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        self.stored.store.read_once(self.stored.found, start, stop, take)
