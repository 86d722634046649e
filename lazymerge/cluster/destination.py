"""Where a group goes: ranges of a shard in a folder that all workers see, or a shard of its own in
an object store. And the sign that the run goes on which gave the group away:

    OUT/.lazymerge/cluster-TOKEN, PREFIX/.lazymerge/cluster-TOKEN
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from ..errors import LazymergeError
from ..output.folder import OWN_FOLDER
from ..output.layout import Placement
from ..output.store.address import StoreAddress
from ..output.store.client import Store
from ..output.writer import PARTIAL_SUFFIX, open_own, write_error

STORE_LOOK_SECONDS = 10.0
"""How often a worker asks a store whether the run goes on: a request each time."""


def token_name(token: str) -> str:
    """Of the sign, in the output."""
    return f"{OWN_FOLDER}/cluster-{token}"


def token_path(folder: Path, token: str) -> Path:
    """The sign in a folder."""
    return folder / token_name(token)


class Sign(Protocol):
    """Whether a run goes on, as its workers see it."""

    def check(self) -> None:
        """Raises:
        LazymergeError: the run has ended, or another goes on with the output: it would wait for
            this worker, and whoever has the complete output may be about to change the inputs.
        """


class FolderSign:
    """The sign in a folder."""

    def __init__(self, folder: Path, token: str) -> None:
        self._path = token_path(folder, token)

    def check(self) -> None:
        """As Sign.check."""
        if not _is_there(self._path):
            raise LazymergeError(f"{self._path} is gone: the run has ended")


def _is_there(path: Path) -> bool:
    """Whether a sign is there, or nobody can say, on a filesystem that is gone for a moment.

    It is opened: an NFS client asks its server then, and may go by what it knew up to a minute ago
    else. Source: nfs(5), close-to-open cache consistency.
    """
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


class StoreSign:
    """The sign in a store."""

    def __init__(self, address: StoreAddress, token: str) -> None:
        self._store = Store(address)
        self._name = token_name(token)
        self._next = 0.0

    def check(self) -> None:
        """As Sign.check; asks every STORE_LOOK_SECONDS."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + STORE_LOOK_SECONDS
        if self._store.head(self._name) is None:
            url = self._store.address.url(self._name)
            raise LazymergeError(f"{url} is gone: the run has ended")


@contextmanager
def shown_in_folder(folder: Path, token: str) -> Iterator[None]:
    """Has the run's sign in a folder, and no other run's."""
    path = token_path(folder, token)
    try:
        for earlier in path.parent.glob("cluster-*"):
            earlier.unlink(missing_ok=True)
        path.touch()
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def shown_in_store(address: StoreAddress, token: str) -> Iterator[None]:
    """Has the run's sign in a store, and no other run's."""
    store = Store(address)
    earlier = [name for name in store.objects() if name.startswith(token_name(""))]
    store.remove(earlier)
    store.put(token_name(token), b"")
    try:
        yield
    finally:
        with suppress(LazymergeError):
            store.remove([token_name(token)])


class RangeWriter:
    """Writes tensors of one shard that somebody else has made and will rename. Opened for writing
    alone: a network filesystem that also reads may hold pages, and write back what lies beside the
    bytes that were written."""

    def __init__(
        self,
        folder: Path,
        file: str,
        file_bytes: int,
        placements: Sequence[Placement],
        token: str,
    ) -> None:
        """file, file_bytes: the shard's final name, and its length. placements: of the tensors.

        Raises:
            LazymergeError: the shard is not there, or not the one that is meant.
        """
        self._path = folder / (file + PARTIAL_SUFFIX)
        self._starts = {tensor.name: tensor.start for tensor in placements}
        self._descriptor = -1
        try:
            self._descriptor = open_own(self._path, os.O_WRONLY)
            size_bytes = os.fstat(self._descriptor).st_size
        except FileNotFoundError:
            raise LazymergeError(
                f"{self._path} is not there: the output must be on a filesystem that all workers "
                "share, at the same path; or give an object store, -o s3://bucket/prefix"
            ) from None
        except OSError as error:
            raise write_error(self._path, error) from error
        if size_bytes != file_bytes or not _is_there(token_path(folder, token)):
            self.close()
            raise LazymergeError(
                f"{self._path} is not the file that the run writes: this machine has another "
                "folder under that name, or the run has ended"
            )

    def write(self, tensor: str, data: memoryview, offset: int) -> None:
        """As Writer.write."""
        start = self._starts[tensor] + offset
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], start + done)
        except OSError as error:
            raise self.failure(tensor, error, len(data) - done) from error

    def place(self, tensor: str) -> tuple[int, int]:
        """As Writer.place."""
        return self._descriptor, self._starts[tensor]

    def failure(self, tensor: str, error: OSError, size_bytes: int) -> LazymergeError:
        """As Writer.failure."""
        return write_error(self._path, error, size_bytes)

    def sync(self) -> None:
        """Waits until what was written is where a power failure of this machine does not reach it.

        Raises:
            LazymergeError: nobody can say that it is.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self._path, error) from error

    def close(self) -> None:
        """May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
