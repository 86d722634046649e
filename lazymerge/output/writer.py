"""Shards on disk: preallocated, written at any place in any order, renamed when complete.

model-00001-of-00002.safetensors.partial   while any tensor of it is missing
model-00001-of-00002.safetensors           complete, and synced unless told otherwise
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..errors import DoesNotFitError, LazymergeError
from .identity import FileIdentity, file_identity
from .layout import Placement, Shard, shard_header

PARTIAL_SUFFIX = ".partial"

_CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Writer(Protocol):
    """Takes what workers make, at any place in any order, from several threads at once."""

    def write(self, tensor: str, data: memoryview, offset: int) -> None:
        """Writes part of a tensor. offset: bytes from the tensor's first byte."""

    def place(self, tensor: str) -> tuple[int, int]:
        """Descriptor of the file that a tensor is in, and the tensor's first byte there: for who
        writes it without `write`."""

    def failure(self, tensor: str, error: OSError, size_bytes: int) -> LazymergeError:
        """What `write` would raise for an error. size_bytes: what was still to be written."""


@runtime_checkable
class PacedWriter(Writer, Protocol):
    """One that has room for a part of its files only: it is asked before anything is written, and
    told afterwards. Byte ranges are within a tensor."""

    def await_room(
        self, tensor: str, start: int, stop: int, is_stopped: Callable[[], bool]
    ) -> bool:
        """Waits until a byte range may be written; False: all has been stopped.

        Raises:
            LazymergeError: what was written before cannot be kept.
        """

    def written(self, tensor: str, start: int, stop: int) -> None:
        """Says that a byte range has been written."""


class ShardWriter:
    """All shards of one output. Methods may be called from several threads at once."""

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        *,
        fsync: bool = True,
        begun: Collection[str] = (),
        complete: Collection[str] = (),
        finished: Collection[str] = (),
    ) -> None:
        """begun: shards that are there under their partial names, to go on with.

        complete: shards that are there under their final names.
        finished: names of the tensors that need not be written.
        """
        self._folder = folder
        self._fsync = fsync
        self._shards = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._placements: dict[str, Placement] = {
            tensor.name: tensor for shard in shards for tensor in shard.tensors
        }
        self._all_shards = tuple(shards)
        self._begun, self._complete = begun, complete
        self._missing = {
            shard.file: sum(tensor.name not in finished for tensor in shard.tensors)
            for shard in shards
        }
        self._descriptors: dict[str, int] = {}
        self._identities: dict[str, FileIdentity] = {}
        self._lock = threading.Lock()

    def create(self) -> None:
        """Creates and preallocates every shard that is not there and writes its header; gives their
        final names to those that lack nothing.

        Raises:
            DoesNotFitError: the disk is full.
            LazymergeError: a file exists already, or cannot be created.
        """
        for shard in self._all_shards:
            if shard.file in self._complete:
                self._sync_complete(shard)
                continue
            path = self._partial(shard)
            try:
                if shard.file in self._begun:
                    self._descriptors[shard.file] = open_shard(path)
                else:
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    self._descriptors[shard.file] = os.open(path, flags, 0o666)
                _preallocate(self._descriptors[shard.file], shard.size_bytes)
            except OSError as error:
                raise write_error(path, error, shard.size_bytes) from error
            if shard.file not in self._begun:
                self._write_at(shard, memoryview(shard_header(shard)), 0)
            if not self._missing[shard.file]:
                self._finish_shard(shard)

    def write(self, tensor: str, data: memoryview, offset: int) -> None:
        """Writes part of a tensor.

        offset: bytes from the tensor's first byte.
        """
        shard = self._shards[tensor]
        self._write_at(shard, data, self._placements[tensor].start + offset)

    def place(self, tensor: str) -> tuple[int, int]:
        """Descriptor of the file that a tensor is in, and the tensor's first byte there: for who
        writes it without `write`."""
        return self._descriptors[self._shards[tensor].file], self._placements[tensor].start

    def identity(self, tensor: str) -> FileIdentity:
        """Which file a tensor is in."""
        file = self._shards[tensor].file
        if file not in self._identities:
            self._identities[file] = file_identity(self._descriptors[file])
        return self._identities[file]

    def failure(self, tensor: str, error: OSError, size_bytes: int) -> LazymergeError:
        """What `write` would raise for an error.

        size_bytes: what was still to be written.
        """
        return write_error(self._partial(self._shards[tensor]), error, size_bytes)

    def finish_tensor(self, tensor: str) -> None:
        """Says that all bytes of a tensor are written; the last one completes its shard."""
        shard = self._shards[tensor]
        with self._lock:
            self._missing[shard.file] -= 1
            if self._missing[shard.file]:
                return
        self._finish_shard(shard)

    def _finish_shard(self, shard: Shard) -> None:
        with self._lock:
            descriptor = self._descriptors.pop(shard.file)
        path = self._partial(shard)
        try:
            try:
                identity = os.fstat(descriptor)
                if self._fsync:
                    _sync(descriptor, path)
            finally:
                os.close(descriptor)
            _check_is_at(identity, path)
            path.rename(self._folder / shard.file)
            if self._fsync:
                sync_folder(self._folder)
        except OSError as error:
            raise write_error(path, error) from error

    def _sync_complete(self, shard: Shard) -> None:
        """An earlier run has finished it, and may not have waited for the disk."""
        if not self._fsync:
            return
        path = self._folder / shard.file
        try:
            descriptor = open_shard(path)
            try:
                _sync(descriptor, path)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_error(path, error) from error

    def close(self) -> None:
        """Closes what is still open; incomplete shards keep their partial names."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            os.close(descriptor)

    def discard(self) -> None:
        """Removes every file under the names of its shards, complete or not, whoever made it."""
        self.close()
        for shard in self._all_shards:
            self._partial(shard).unlink(missing_ok=True)
            (self._folder / shard.file).unlink(missing_ok=True)

    def _partial(self, shard: Shard) -> Path:
        return self._folder / (shard.file + PARTIAL_SUFFIX)

    def _write_at(self, shard: Shard, data: memoryview, offset: int) -> None:
        descriptor = self._descriptors[shard.file]
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            raise write_error(self._partial(shard), error, len(data) - done) from error


def open_shard(path: Path) -> int:
    """A descriptor of a shard that is there, for reading and writing. As open_own."""
    return open_own(path, os.O_RDWR)


def open_own(path: Path, flags: int, *, may_have_other_names: bool = False) -> int:
    """A descriptor of a file that lazymerge has made or makes. Links are not followed, and pipes
    not waited for: an output may come from somebody else.

    may_have_other_names: hard links are let pass; it is not going to be written to then.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o666)
    status = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = "not a regular file"
    elif status.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR) and not may_have_other_names:
        problem = "it has other names too (hard links), which would change with it: copy it"
    if problem is not None:
        os.close(descriptor)
        raise OSError(errno.EINVAL, problem, str(path))
    return descriptor


def _check_is_at(identity: os.stat_result, path: Path) -> None:
    """Raises:
    OSError: a path leads to another file than the one that was written.
    """
    if not os.path.samestat(identity, os.stat(path, follow_symlinks=False)):
        raise OSError(errno.ESTALE, "it was removed or replaced while it was written", str(path))


def sync_file(path: Path) -> None:
    """Waits until a file that is there is on disk.

    Raises:
        LazymergeError: the system cannot say that it is.
    """
    try:
        descriptor = open_own(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(path, error) from error


def sync_folder(folder: Path) -> None:
    """Makes renames within a folder durable, where its filesystem can: some network and user-space
    filesystems refuse to sync a folder, and there is nothing else to ask of them.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def _sync(descriptor: int, path: Path) -> None:
    """Waits until a file is on disk. If that fails, nobody knows what of it is there, and the
    system may say otherwise when asked again: the file goes, so that no later run believes it."""
    try:
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _preallocate(descriptor: int, size_bytes: int) -> None:
    """Reserves the disk space, so that a full disk shows now and not after an hour."""
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size_bytes)  # a filesystem that cannot reserve


def write_error(path: Path, error: OSError, size_bytes: int = 0) -> LazymergeError:
    """What to raise for an error of the system while a file was written.

    size_bytes: what was still to be written, 0 if unknown.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        wanted = f" ({size_bytes} bytes were to be written)" if size_bytes else ""
        return DoesNotFitError(
            f"no room for {path}: {error.strerror}{wanted}; "
            "free some space or choose another output folder"
        )
    return LazymergeError(f"cannot write {path}: {error.strerror}")
