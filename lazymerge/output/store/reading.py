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

    def read(self, start: int, stop: int, take: Take) -> None:
        """Hands a byte range on, piece by piece; asks again for what does not come.

        Raises:
            InputError: the object is not what it was. LazymergeError: it cannot be read.
        """
        url = self.store.address.url(self.found.name)
        file = RemoteFile(url, self.found.size_bytes, self.found.etag)
        read_range(_Reader(self), file, start, stop, take)

    def check(self) -> None:
        """Every answer is held against the ETag."""


@dataclass(frozen=True, slots=True)
class _Reader:
    stored: StoredFile

    def read(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        self.stored.store.read_once(self.stored.found, start, stop, take)
